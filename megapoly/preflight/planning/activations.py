"""Measure the memory of activations: one micro-batch on the meta device, forward and backward."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel.schedules import (
    get_pp_rank_microbatches,
    get_schedule_table,
)
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor
from torch.autograd.function import Function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from megapoly.config import Config
from megapoly.config.resolve import sequence_parts
from megapoly.model import attention
from megapoly.model.builder import unwrap
from megapoly.preflight.planning.fake_job import current_device, replaced


@dataclass(frozen=True)
class ActivationBytes:
    """Bytes that passes of one micro-batch need.

    Args:
        kept: from a forward pass until its backward pass, by model chunk of the rank.
        passing: the maximum in addition to ``kept`` of all chunks, while a pass runs.
    """

    kept: tuple[int, ...]
    passing: int


class LiveBytes(TorchDispatchMode):
    """A mode that counts the live bytes of the meta device, each storage once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Do not count the storages of these tensors."""
        self._known.update(tensor.untyped_storage()._cdata for tensor in tensors)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._count, result)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if tensor.is_meta and key not in self._known:
            self._known.add(key)
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._forget, key, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def measure_activations(
    config: Config, chunks: Sequence[DistributedDataParallel]
) -> ActivationBytes:
    """Run one micro-batch through the current rank's model and return what it needs.

    Attention is torch's flash kernel, as on CUDA. In a mixture of experts all experts get the same
    number of tokens, within one.

    Args:
        config: resolved.
        chunks: on the meta device, wrapped for data parallelism.

    Raises:
        NotImplementedError: an operator needs data.
    """
    if config.parallel.overlap_param_gather:
        for chunk in chunks:
            chunk.disable_forward_pre_hook(param_sync=False)  # gathers parameters in place
    live = LiveBytes()
    buffers = _engine_buffers(config, chunks)
    live.leave_out(buffers)
    for chunk in chunks:
        live.leave_out(chunk.parameters())
        live.leave_out(p.main_grad for p in chunk.parameters())
    with _as_in_training(), live:
        kept, outputs = [], []
        for chunk in chunks:
            before = live.now
            outputs.append(_forward(config, chunk))
            kept.append(live.now - before)
        for chunk in reversed(chunks):
            output = outputs.pop()
            with chunk.no_sync():
                output.backward(torch.empty_like(output))
            del output
    passing = live.most - sum(kept) + sum(buffer.nbytes for buffer in buffers)
    return ActivationBytes(tuple(kept), passing)


def _engine_buffers(config: Config, chunks: Sequence[DistributedDataParallel]) -> list[Tensor]:
    """Return buffers that the engine makes in a first pass and keeps, for what ranks gather."""
    if not config.parallel.sequence_parallel:
        return []
    with _as_in_training():
        for chunk in chunks:
            _forward(config, chunk)
    return list(parallel_state.get_global_memory_buffer().buffer.values())


def _forward(config: Config, chunk: DistributedDataParallel) -> Tensor:
    """Return a chunk's output for the next chunk, or the loss."""
    training, parallel = config.training, config.parallel
    model = unwrap(chunk)
    length = training.seq_length // parallel.context_parallel_size
    batch = training.micro_batch_size
    if not model.pre_process:
        cut = sequence_parts(parallel)
        shape = (length // cut, batch, config.model.hidden_size)
        dtype = model.config.pipeline_dtype
        received = torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)
        model.set_input_tensor(received)
    tokens, positions, labels = torch.empty(3, batch, length, dtype=torch.long, device="meta")
    labels_of_last = labels if model.post_process else None
    output: Tensor = chunk(tokens, positions, attention_mask=None, labels=labels_of_last)
    if not model.post_process:
        return output
    return (output.float() * torch.empty(batch, length, device="meta")).sum()


def kept_by_schedule(config: Config, kept: Sequence[int], num_microbatches: int) -> int:
    """Return the maximum of bytes that the current rank's forward passes keep at one time.

    The engine's schedule runs some forward passes first, then alternates one forward and one
    backward pass.

    Args:
        config: resolved; the engine's process groups must exist.
        kept: bytes of one micro-batch, by model chunk.
        num_microbatches: micro-batches of one step.
    """
    stages = config.parallel.pipeline_model_parallel_size
    chunks = len(kept)
    total, _, warmup, _ = get_pp_rank_microbatches(num_microbatches, chunks, stages)
    forward = [chunk for _, chunk in get_schedule_table(num_microbatches, chunks, stages)]
    now = most = sum(kept[chunk] for chunk in forward[:warmup])
    for i, chunk in enumerate(forward[warmup:]):
        now += kept[chunk]
        most = max(most, now)
        now -= kept[chunks - 1 - forward[i]]
    assert len(forward) == total
    return most


@contextlib.contextmanager
def _as_in_training() -> Iterator[None]:
    """Replace functions that cannot run without data."""
    # Tensors are made on the CPU by default, as in training: the engine reads some of them.
    with _even_routing(), _no_traces(), _shapes_of_cuda(), torch.device("cpu"):
        yield


@contextlib.contextmanager
def _shapes_of_cuda() -> Iterator[None]:
    """Run operators as CUDA does, where they keep other tensors than on the meta device."""
    with (
        replaced(F, "scaled_dot_product_attention", _flash_attention),
        replaced(attention, "causal_lower_right", lambda *sizes: None),
        replaced(F, "rms_norm", _fused_rms_norm),
        replaced(F, "dropout", _fused_dropout),
        replaced(Tensor, "masked_select", _routed_places),
    ):
        yield


def _flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    dropout_p: float,
    scale: float | None,
    **mask: Any,
) -> Tensor:
    """Run the kernel with a causal mask, the only one here, which takes no memory."""
    return torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, dropout_p, True, scale=scale
    )[0]


def _fused_rms_norm(x: Tensor, shape: Any, weight: Tensor, eps: float) -> Tensor:
    return _FusedRMSNorm.apply(x, weight)


def _fused_dropout(
    x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    """Run CUDA's kernel, which keeps one byte for each number."""
    return torch.native_dropout(x, p, training)[0] if p and training else x


class _FusedRMSNorm(Function):
    """CUDA's kernel, which keeps one fp32 number for each row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def _routed_places(x: Tensor, mask: Tensor) -> Tensor:
    return _RoutedPlaces.apply(x, mask)


class _RoutedPlaces(Function):
    """``masked_select`` by the routing map [experts, tokens], in which each token has topk True."""

    topk = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor) -> Tensor:
        if x.requires_grad:
            ctx.save_for_backward(x, mask)
        return x.new_empty(mask.shape[1] * _RoutedPlaces.topk)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        x, _ = ctx.saved_tensors
        return torch.empty_like(x), None


@contextlib.contextmanager
def _even_routing() -> Iterator[None]:
    """Give the all-to-all dispatcher an even routing instead of one without data.

    Shapes depend on how many tokens each expert gets. Every rank routes its tokens in the same way:
    token t to the topk experts from t topk on, modulo the number of experts.
    """
    preprocess = MoEAlltoAllTokenDispatcher.preprocess

    def evenly(dispatcher: Any, routing_map: Tensor) -> Tensor:
        num_tokens, num_experts = routing_map.shape
        topk = _RoutedPlaces.topk = dispatcher.config.moe_router_topk
        cpu = torch.device("cpu")
        with current_device(cpu), cpu:
            first = torch.arange(num_tokens)[:, None] * topk
            places = (first + torch.arange(topk)) % num_experts
            even = torch.zeros(num_tokens, num_experts, dtype=torch.bool)
            return preprocess(dispatcher, even.scatter_(1, places, True))

    with replaced(MoEAlltoAllTokenDispatcher, "preprocess", evenly):
        yield


@contextlib.contextmanager
def _no_traces() -> Iterator[None]:
    """Discard the router losses, which the engine collects in globals."""
    with (
        replaced(moe_utils, "_MOE_LAYER_WISE_LOGGING_TRACKER", {}),
        replaced(MoEAuxLossAutoScaler, "main_loss_backward_scale", None),
    ):
        yield
