"""Every change that this project makes to Megatron-Core 0.16.1 at run time, and nothing else.

The engine is written for CUDA.

- :func:`install_on_cpu` lets its training path run on CPU with gloo; it does not affect CUDA runs.
- :func:`install_without_transformer_engine` repairs what breaks without Transformer Engine, on any
  device.
- :func:`install_on_every_device` changes recomputation, for PolyNorm, and saving.
- :func:`install_with_transformer_engine` changes recomputation in FP8.
- :func:`read_checkpoints_with` changes what reads checkpoints.

Each function below names the places in ``megatron/core/`` that make it necessary. What a dry run
replaces for its duration is in ``megapoly/preflight/planning``, ``fake_job.py`` and
``activations.py``.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import queue
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

CPU = torch.device("cpu")

_installed: set[str] = set()


def install_on_every_device() -> None:
    """Avoid PolyNorm's collective in recomputation and a process in saving; idempotent."""
    if "every" not in _installed:
        _installed.add("every")
        from megatron.core.tensor_parallel.random import CheckpointFunction

        _recomputation_keeps_row_statistics(CheckpointFunction)
        _saving_starts_no_manager()


def install_on_cpu() -> None:
    """Make the engine's training path run on CPU with gloo; idempotent."""
    if "cpu" in _installed:
        return
    _installed.add("cpu")
    _current_device_is_cpu()
    _streams_do_nothing()
    _random_state_of_the_cpu_generator()
    _cuda_literals_mean_cpu()
    _all_gather_takes_uneven_shapes()
    _splits_become_numpy()
    _grouped_gemm_name_is_defined()
    # Also if Transformer Engine or apex is installed: theirs are CUDA kernels.
    _adam_keeps_the_fused_state_layout()
    _gradients_are_scaled_in_torch()
    _gradient_norm_is_summed_in_fp64()


def install_without_transformer_engine() -> None:
    """Repair what is undefined or unusable in the engine without Transformer Engine and apex."""
    if "no_te" in _installed:
        return
    _installed.add("no_te")
    _grouped_gemm_name_is_defined()
    import megatron.core.optimizer as engine_optimizer

    if engine_optimizer.USING_PYTORCH_OPTIMIZER:
        _adam_keeps_the_fused_state_layout()
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads

    if clip_grads.l2_norm_impl is utils.local_multi_tensor_l2_norm:
        _gradient_norm_is_summed_in_fp64()


def install_with_transformer_engine() -> None:
    """Avoid PolyNorm's collective in recomputation in FP8, which is Transformer Engine's."""
    from megatron.core.extensions.transformer_engine import HAVE_TE

    if "te" in _installed or not HAVE_TE:
        return
    _installed.add("te")
    from transformer_engine.pytorch.distributed import _CheckpointFunction

    _recomputation_keeps_row_statistics(_CheckpointFunction)


def _recomputation_keeps_row_statistics(checkpoint_function: Any) -> None:
    """Keep row statistics: recomputing a layer repeats its forward pass with PolyNorm's all-reduce.

    ``CheckpointFunction`` (tensor_parallel/random.py:496) has no hook for what to keep, so the
    statistics of its region are kept next to what it saves. Neither has ``_CheckpointFunction``
    (transformer_engine/pytorch/distributed.py:319), which the engine uses for FP8.
    """
    from megapoly.ops.recomputation import keeping_row_statistics, reusing_row_statistics

    run, recompute = checkpoint_function.forward, checkpoint_function.backward

    def forward(ctx: Any, *args: Any) -> Any:
        ctx.row_statistics = []
        with keeping_row_statistics(ctx.row_statistics):
            return run(ctx, *args)

    def backward(ctx: Any, *grads: Any) -> Any:
        with reusing_row_statistics(ctx.row_statistics):
            return recompute(ctx, *grads)

    checkpoint_function.forward = staticmethod(forward)
    checkpoint_function.backward = staticmethod(backward)


def _saving_starts_no_manager() -> None:
    """Replace the process that dist_checkpointing/strategies/filesystem_async.py:51 starts.

    It manages a queue and imports torch on every rank, 2.4 s of a first save with 2 ranks on 2
    cores, and outlives a rank that is killed. Only the engine's own writers need it:
    :mod:`megapoly.training.checkpoint_files` has another, which leaves this queue empty.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._get_write_results_queue = functools.cache(queue.Queue)


def read_checkpoints_with(reader: type[Any], load_object: Callable[[Any], Any]) -> None:
    """Replace what unpickles when the engine loads a checkpoint; idempotent.

    dist_checkpointing/strategies/torch.py:758 makes a reader that unpickles ``.metadata``, and its
    planner (:484) inherits ``load_bytes``, which unpickles objects: torch 2.13,
    distributed/checkpoint/filesystem.py:930 and default_planner.py:387.

    Args:
        reader: a ``FileSystemReader`` that caches its metadata.
        load_object: returns the object in a stream.
    """
    from megatron.core.dist_checkpointing.strategies import torch as strategies
    from torch.distributed.checkpoint._nested_dict import set_element

    def load_bytes(self: Any, read_item: Any, value: Any) -> None:
        name, loaded = read_item.dest_index.fqn, load_object(value)
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[name], loaded)
        else:
            self.state_dict[name] = loaded

    strategies.CachedMetadataFileSystemReader = reader
    strategies.FileSystemReader = reader
    strategies.MCoreLoadPlanner.load_bytes = load_bytes


def _current_device_is_cpu() -> None:
    """Replace `torch.cuda.current_device()`, which nearly every module uses.

    For example distributed/param_and_grad_buffer.py:806.
    """
    torch.cuda.current_device = lambda: CPU  # type: ignore[assignment,return-value]


class _NullEvent:
    """A CUDA event on a device without streams: everything before it has happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def record(self, *args: Any) -> None: ...
    def wait(self, *args: Any) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True

    def elapsed_time(self, other: _NullEvent) -> float:
        return 0.0


class _NullStream:
    """A CUDA stream on a device without streams: work is done when the call returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, *args: Any) -> None: ...
    def wait_event(self, *args: Any) -> None: ...
    def record_event(self, event: Any = None) -> Any:
        return event or _NullEvent()

    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True


def _streams_do_nothing() -> None:
    """Replace streams, events and synchronisation.

    DDP, MoE dispatchers, p2p, checkpoints and timers use them: for example
    transformer/moe/token_dispatcher.py, pipeline_parallel/p2p_communication.py.
    """
    stream = _NullStream()
    replacements: dict[str, Any] = {
        "synchronize": lambda *args, **kwargs: None,
        "Stream": _NullStream,
        "Event": _NullEvent,
        "current_stream": lambda *args, **kwargs: stream,
        "default_stream": lambda *args, **kwargs: stream,
        "stream": lambda *args, **kwargs: contextlib.nullcontext(),
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)


def _random_state_of_the_cpu_generator() -> None:
    """Let the RNG tracker use the CPU generator.

    tensor_parallel/random.py:42-130 and :235 read and write CUDA generators. :422 seeds with
    `torch.cuda.manual_seed`, which only queues a call without CUDA: torch must be seeded as well
    (:func:`seed_model_parallel_rng`).
    """
    from megatron.core.tensor_parallel import random as engine_random

    class CPURNGStatesTracker(engine_random.CudaRNGStatesTracker):
        """Named states of torch's default CPU generator, with the engine tracker's interface."""

        def add(self, name: str, seed: int) -> None:
            self._is_initialized = True
            if seed in self.seeds_ or name in self.states_:
                raise ValueError(f"random state {name!r} or its seed {seed} is already added")
            self.seeds_.add(seed)
            self.states_[name] = torch.Generator().manual_seed(seed).get_state()

        @contextlib.contextmanager
        def fork(
            self, name: str = engine_random._MODEL_PARALLEL_RNG_TRACKER_NAME
        ) -> Iterator[None]:
            if name not in self.states_:
                raise ValueError(f"random state {name!r} is not added")
            outer_state = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(outer_state)

    engine_random._CUDA_RNG_STATE_TRACKER = CPURNGStatesTracker()
    engine_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
    engine_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    engine_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    torch.cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()


def seed_model_parallel_rng(seed: int) -> None:
    """Seed the engine's RNG tracker and torch itself, on either device."""
    from megatron.core import tensor_parallel

    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    torch.manual_seed(seed)


# Modules of the training path that write the device as "cuda".
_MODULES_WITH_CUDA_LITERALS = (
    "pipeline_parallel.schedules",  # :596, :983, :2138
    "optimizer.optimizer",  # :473, :481, :485, :907
    "optimizer.clip_grads",  # :90, :103, :115, :174, :207
    "optimizer.grad_scaler",  # :15, :88
    "transformer.moe.moe_utils",  # :998
    "transformer.moe.token_dispatcher",  # :404
    "transformer.utils",  # :35, :40
    "tensor_parallel.data",  # :37, :84
    "utils",  # :898, :1207
    "models.common.embeddings.rope_utils",  # :63, pinned memory
    "dist_checkpointing.strategies.state_dict_saver",  # :204
    "dist_checkpointing.exchange_utils",  # :98-110, :326
    "rerun_state_machine",  # :261
)

_FACTORIES = ("zeros", "ones", "empty", "tensor", "full", "empty_like", "zeros_like")


def _is_cuda(device: Any) -> bool:
    return device is not None and str(device).startswith("cuda")


class _TorchWithoutCuda(types.ModuleType):
    """`torch` for one engine module: its factories put on the CPU what is meant for CUDA.

    A `TorchFunctionMode` would do the same at a cost for every call; this costs only in factories.
    """

    def __init__(self) -> None:
        super().__init__("torch")
        for name in _FACTORIES:
            setattr(self, name, self._on_cpu(getattr(torch, name)))
        self.device = lambda *args: CPU if args and _is_cuda(args[0]) else torch.device(*args)

    @staticmethod
    def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(factory)
        def make(*args: Any, **kwargs: Any) -> torch.Tensor:
            if _is_cuda(kwargs.get("device")):
                kwargs["device"] = CPU
            kwargs.pop("pin_memory", None)  # page-locked memory needs a GPU's driver
            return factory(*args, **kwargs)

        return make

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _cuda_literals_mean_cpu() -> None:
    """Replace device literals, `Tensor.cuda()` and `Tensor.type() == "torch.cuda.FloatTensor"`.

    The last is in optimizer/optimizer.py:671-690, optimizer/distrib_optimizer.py:361, :420, :582
    and optimizer/clip_grads.py:167.
    """
    torch_without_cuda = _TorchWithoutCuda()
    for name in _MODULES_WITH_CUDA_LITERALS:
        importlib.import_module(f"megatron.core.{name}").torch = torch_without_cuda  # type: ignore[attr-defined]
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    original_type = torch.Tensor.type

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original_type(self, *args, **kwargs)
        if args or kwargs:
            return result
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.startswith("megatron.core.optimizer"):
            # A dry run's parameters: "torch.meta.FloatTensor".
            return result.replace("torch.meta.", "torch.").replace("torch.", "torch.cuda.", 1)
        return result

    torch.Tensor.type = type_  # type: ignore[assignment,method-assign]


def _all_gather_takes_uneven_shapes() -> None:
    """Let gloo gather uneven first dimensions, as nccl does: pad to the longest and cut again.

    tensor_parallel/mappings.py:150 needs it, for the all-to-all dispatcher with expert tensor
    parallelism.
    """
    equal_all_gather = dist.all_gather

    def all_gather(
        tensor_list: list[torch.Tensor],
        tensor: torch.Tensor,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        lengths = [t.shape[0] if t.dim() else 1 for t in tensor_list]
        if len(set(lengths)) <= 1:
            return equal_all_gather(tensor_list, tensor, group, async_op)
        if async_op:
            raise ValueError("an uneven all_gather on gloo cannot be asynchronous")
        padded = tensor.new_zeros((max(lengths), *tensor.shape[1:]))
        padded[: tensor.shape[0]] = tensor
        gathered = [torch.empty_like(padded) for _ in lengths]
        equal_all_gather(gathered, padded, group)
        for target, source, length in zip(tensor_list, gathered, lengths, strict=True):
            target.copy_(source[:length])
        return None

    dist.all_gather = all_gather


def _splits_become_numpy() -> None:
    """Convert splits to numpy; transformer/moe/moe_utils.py:1093 does only `if tensor.is_cuda`.

    `all_to_all_single` (tensor_parallel/mappings.py:444) rejects tensors as splits.
    """
    from megatron.core.transformer.moe import token_dispatcher

    def maybe_move_tensor_to_cpu(
        tensor: Any, as_numpy: bool = False, record_stream: bool = False
    ) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu


def _grouped_gemm_name_is_defined() -> None:
    """Define a name of transformer/moe/moe_utils.py:1192 and :1225 that a failed import leaves out.

    Fixed in 0.17.
    """
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def _adam_keeps_the_fused_state_layout() -> None:
    """Replace torch's AdamW, with which the distributed optimizer cannot load a checkpoint.

    optimizer/distrib_optimizer.py:641, :823 and :940 expect `step` in the parameter group, as the
    fused Adam of Transformer Engine and apex has it.
    """
    import megatron.core.optimizer as engine_optimizer
    from megatron.core.optimizer import distrib_optimizer

    from megapoly.platform.adam import Adam

    engine_optimizer.Adam, engine_optimizer.USING_PYTORCH_OPTIMIZER = Adam, False
    distrib_optimizer.Adam = Adam
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True


def _gradients_are_scaled_in_torch() -> None:
    """Scale in torch; optimizer/clip_grads.py:11-25 uses CUDA kernels of an installed package."""
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads

    clip_grads.multi_tensor_applier = utils.local_multi_tensor_applier
    clip_grads.multi_tensor_scale_impl = utils.local_multi_tensor_scale


def _gradient_norm_is_summed_in_fp64() -> None:
    """Sum squares in fp64; utils.py:1200 sums in fp32, 1e-5 off for a million elements on CPU.

    The error depends on how a parameter is sharded, and with gradient clipping it enters every
    update: after 20 steps of moe_tiny the losses at TP 1 and 2 were 2.5e-4 apart, and 1e-6 with
    this norm.
    """
    from megatron.core.optimizer import clip_grads

    def l2_norm(
        chunk_size: int, noop_flag: torch.Tensor, tensor_lists: list[list[torch.Tensor]], *args: Any
    ) -> tuple[torch.Tensor, None]:
        norms = [
            torch.linalg.vector_norm(tensor, dtype=torch.float64)
            for tensors in tensor_lists
            for tensor in tensors
        ]
        return torch.linalg.vector_norm(torch.stack(norms)).reshape(1), None

    clip_grads.l2_norm_impl = l2_norm
