"""Linear maps of a layer's routed experts, without Transformer Engine."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint
from torch import Tensor
from torch.autograd.function import Function

logger = logging.getLogger(__name__)

# Sizes of a weight: `grouped_mm` requires strides of 16 bytes, which are 8 numbers in bf16.
_GROUPED_MM_MULTIPLE = 8
# Compute capabilities with a kernel: Hopper and Blackwell (ATen/native/cuda/GroupedBlas.cpp).
_GROUPED_MM_CAPABILITIES = (9, 10)


def grouped_mm_obstacle(
    device: torch.device, dtype: torch.dtype, shape: Sequence[int]
) -> str | None:
    """Return why to loop over ``torch.mm`` and not call ``grouped_mm``; None: call it.

    On CUDA ``torch.nn.functional.grouped_mm`` is one kernel for all experts, in bf16. For inputs
    that the kernel does not support, it loops over experts itself and fetches the offsets from the
    device to do so; the loop here has them on the host.

    On CPU it is also such a loop, with the same bits, and puts the gradients of all weights in one
    tensor. Forward and backward of 8 experts of [384, 256] with 2048 rows take 20.2 ms as a loop
    and 21.0 ms with ``grouped_mm``, those of 64 experts of [256, 512] with 4096 rows 68 ms and
    88 ms (fp32, one core of an AMD EPYC, torch 2.13). The loop supports any dtype and size.

    Args:
        device: of rows and weights.
        dtype: of rows and weights.
        shape: [out, in] of one weight.
    """
    if device.type != "cuda":
        return f"grouped_mm is no faster on {device.type}"
    if dtype != torch.bfloat16:
        return f"grouped_mm has no kernel for {dtype}"
    capability = torch.cuda.get_device_capability(device)[0]
    if capability not in _GROUPED_MM_CAPABILITIES:
        return f"grouped_mm has no kernel for compute capability {capability}"
    if any(size % _GROUPED_MM_MULTIPLE for size in shape):
        sizes = " x ".join(str(size) for size in shape)
        return f"grouped_mm requires sizes divisible by {_GROUPED_MM_MULTIPLE}, not {sizes}"
    return None


@functools.cache
def _log_once(message: str, *values: str) -> None:
    logger.info(message, *values)


class LoopedMatmul(Function):
    """y[rows of expert i] = x[rows of expert i] W_i^T, one expert after another.

    Products are written to their rows directly: concatenation would copy every activation again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, splits: list[int], *weights: Tensor) -> Tensor:
        """Map [rows, in] to [rows, out] with ``weights`` [out, in]; ``splits``: rows of each."""
        y = x.new_empty(x.shape[0], weights[0].shape[0])
        for x_i, y_i, weight in zip(x.split(splits), y.split(splits), weights, strict=True):
            torch.mm(x_i, weight.t(), out=y_i)
        ctx.save_for_backward(x, *weights)
        ctx.splits = splits
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of the rows and of each weight."""
        x, *weights = ctx.saved_tensors
        grad_output = grad_outputs[0].contiguous()
        grad_x = torch.empty_like(x)
        parts = [tensor.split(ctx.splits) for tensor in (x, grad_output, grad_x)]
        grad_weights = []
        for x_i, grad_i, grad_x_i, weight in zip(*parts, weights, strict=True):
            torch.mm(grad_i, weight, out=grad_x_i)
            grad_weights.append(grad_i.t() @ x_i)  # an expert without rows: exact zeros
        return grad_x, None, *grad_weights


class GroupedMatmul(Function):
    """y[rows of expert i] = x[rows of expert i] W_i^T, all experts in one ``grouped_mm``.

    The CPU never waits for the device: the number of rows of each expert is already known on the
    host (the dispatcher needs it) and is copied to the device as offsets.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, splits: list[int], *weights: Tensor) -> Tensor:
        """Map [rows, in] to [rows, out] with ``weights`` [out, in]; ``splits``: rows of each."""
        x = x.contiguous()
        ends = list(itertools.accumulate(splits))
        assert ends[-1] == x.shape[0], f"{x.shape[0]} rows, but {splits} for the experts"
        offsets = torch.tensor(ends, dtype=torch.int32).to(x.device, non_blocking=True)
        ctx.save_for_backward(x, offsets, *weights)
        ctx.splits = splits
        return F.grouped_mm(x, stacked(weights).transpose(1, 2), offs=offsets)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of the rows and of each weight."""
        x, offsets, *weights = ctx.saved_tensors
        grad_output = grad_outputs[0].contiguous()
        grad_x = F.grouped_mm(grad_output, stacked(weights), offs=offsets)
        grad_weights = F.grouped_mm(grad_output.t(), x, offs=offsets).unbind()
        for grad_weight, num_rows in zip(grad_weights, ctx.splits, strict=True):
            if num_rows == 0:
                grad_weight.zero_()  # torch does not document the result of a sum over no rows
        return grad_x, None, *grad_weights


def stacked(weights: Sequence[Tensor]) -> Tensor:
    """Stack weights of [out, in] to [experts, out, in], as a view if they are evenly spaced.

    They are evenly spaced where :class:`GroupedLinear` makes them and in the distributed
    optimizer's buffer. There a bucket may end between two experts (``overlap_grad_reduce``); the
    weights are then copied, which can cost as much as the products (64 experts as above: 149 ms,
    not 88 ms).
    """
    first = weights[0]
    begins = [weight.storage_offset() for weight in weights]
    step = begins[1] - begins[0] if len(weights) > 1 else first.numel()
    storages = {weight.untyped_storage().data_ptr() for weight in weights}
    evenly = begins == [begins[0] + i * step for i in range(len(weights))]
    if step > 0 and evenly and len(storages) == 1:
        return first.as_strided((len(weights), *first.shape), (step, *first.stride()))
    _log_once("products of experts: weights are copied, they are in more than one bucket")
    return torch.stack(list(weights))


class GroupedLinear(MegatronModule):
    """One linear map per local expert, applied to rows sorted by expert.

    Source: constructor, parameter names (``weight0``, ``weight1``, ..) and checkpoint layout are
    as in ``TEColumnParallelGroupedLinear`` and ``TERowParallelGroupedLinear``
    (extensions/transformer_engine.py), so that ``TEGroupedMLP`` works with either.

    Args:
        num_gemms: local experts.
        input_size: width of the input over all expert-tensor-parallel ranks.
        output_size: width of the output over all expert-tensor-parallel ranks.
        config: the engine's configuration.
        init_method: not used; :mod:`megapoly.model.initialization` sets the weights.
        bias: must be false.
        skip_bias_add: not used.
        is_expert: must be true.
        tp_comm_buffer_name: not used.
        pg_collection: process groups of the experts.

    Note:
        The token dispatcher gathers and scatters rows over the expert-tensor-parallel ranks; a
        row-parallel map returns a partial sum.
    """

    parallel_axis: int  # axis of a weight that is split over the expert-tensor-parallel ranks

    def __init__(
        self,
        num_gemms: int,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        init_method: Callable[[Tensor], None],
        bias: bool,
        skip_bias_add: bool,
        is_expert: bool,
        tp_comm_buffer_name: str | None = None,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config=config)
        assert is_expert and not bias, "grouped linear maps are for experts without biases"
        self.num_gemms = num_gemms
        self.tp_group, self.ep_group = pg_collection.expt_tp, pg_collection.ep
        self.expert_dp_group = pg_collection.expt_dp
        shape = [output_size, input_size]
        shape[self.parallel_axis] //= self.tp_group.size()
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        weights = torch.empty((num_gemms, *shape), dtype=config.params_dtype, device=device)
        # Last expert first: the distributed optimizer lays parameters out from last to first, so
        # that expert 0 comes first in its buffer, as it does here, see `stacked`.
        for i in reversed(range(num_gemms)):
            weight = torch.nn.Parameter(weights[i])
            set_tensor_model_parallel_attributes(weight, True, self.parallel_axis, 1)
            self.register_parameter(f"weight{i}", weight)

    def forward(self, x: Tensor, m_splits: list[int]) -> tuple[Tensor, None]:
        """Map [rows, input_size] to [rows, output_size]; ``m_splits``: rows of each expert."""
        weights = [getattr(self, f"weight{i}") for i in range(self.num_gemms)]
        obstacle = grouped_mm_obstacle(x.device, x.dtype, weights[0].shape)
        if obstacle is None:
            _log_once("products of experts: torch.nn.functional.grouped_mm")
        else:
            _log_once("products of experts: torch.mm for each, %s", obstacle)
        # Without rows there is no kernel to launch.
        matmul = GroupedMatmul if obstacle is None and x.shape[0] else LoopedMatmul
        return matmul.apply(x, m_splits, *weights), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None
    ) -> dict[str, Any]:
        """Return entries of one tensor with a leading expert axis for all experts of a layer."""
        expert_axis = len(sharded_offsets)
        first_expert = self.ep_group.rank() * self.num_gemms
        num_experts = self.ep_group.size() * self.num_gemms
        return {
            f"{prefix}weight{i}": make_tp_sharded_tensor_for_checkpoint(
                getattr(self, f"weight{i}"),
                f"{prefix}weight",
                self.parallel_axis,
                replica_id=(0, 0, self.expert_dp_group.rank()),
                prepend_offsets=(*sharded_offsets, (expert_axis, first_expert + i, num_experts)),
                tp_group=self.tp_group,
                dp_cp_group=metadata["dp_cp_group"],
            )
            for i in range(self.num_gemms)
        }


class ColumnParallelGroupedLinear(GroupedLinear):
    """FC1 of the experts: the output is split over the expert-tensor-parallel ranks."""

    parallel_axis = 0


class RowParallelGroupedLinear(GroupedLinear):
    """FC2 of the experts: the input is split over the expert-tensor-parallel ranks."""

    parallel_axis = 1
