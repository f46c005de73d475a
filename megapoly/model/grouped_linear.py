"""The matrices of a layer's routed experts, without Transformer Engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint
from torch import Tensor
from torch.autograd.function import Function


class _GroupedMatmul(Function):
    """y[rows of expert i] = x[rows of expert i] W_i^T.

    Products are written to their rows directly: joining them would copy every activation again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, splits: list[int], *weights: Tensor) -> Tensor:
        y = x.new_empty(x.shape[0], weights[0].shape[0])
        for x_i, y_i, weight in zip(x.split(splits), y.split(splits), weights, strict=True):
            torch.mm(x_i, weight.t(), out=y_i)
        ctx.save_for_backward(x, *weights)
        ctx.splits = splits
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        grad_output = grad_outputs[0].contiguous()
        grad_x = torch.empty_like(x)
        parts = [tensor.split(ctx.splits) for tensor in (x, grad_output, grad_x)]
        grad_weights = []
        for x_i, grad_i, grad_x_i, weight in zip(*parts, weights, strict=True):
            torch.mm(grad_i, weight, out=grad_x_i)
            grad_weights.append(grad_i.t() @ x_i)  # an expert without rows: exact zeros
        return grad_x, None, *grad_weights


class GroupedLinear(MegatronModule):
    """One linear map for each local expert, applied to rows sorted by expert.

    Source: constructor, parameter names (``weight0``, ``weight1``, ..) and checkpoint layout are
    those of ``TEColumnParallelGroupedLinear`` and ``TERowParallelGroupedLinear``
    (extensions/transformer_engine.py), so that ``TEGroupedMLP`` takes either.

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
        Gathering and scattering of rows over the expert-tensor-parallel ranks is the token
        dispatcher's; a row-parallel map returns a partial sum.
    """

    parallel_axis: int  # axis of a weight that is cut over the expert-tensor-parallel ranks

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
        for i in range(num_gemms):
            weight = torch.nn.Parameter(
                torch.empty(shape, dtype=config.params_dtype, device=device)
            )
            set_tensor_model_parallel_attributes(weight, True, self.parallel_axis, 1)
            self.register_parameter(f"weight{i}", weight)

    def forward(self, x: Tensor, m_splits: list[int]) -> tuple[Tensor, None]:
        """[rows, input_size] -> [rows, output_size]; ``m_splits``: rows of each expert."""
        weights = [getattr(self, f"weight{i}") for i in range(self.num_gemms)]
        return _GroupedMatmul.apply(x, m_splits, *weights), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None
    ) -> dict[str, Any]:
        """All experts of a layer are one tensor with a leading expert axis."""
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
    """FC1 of the experts: the output is cut over the expert-tensor-parallel ranks."""

    parallel_axis = 0


class RowParallelGroupedLinear(GroupedLinear):
    """FC2 of the experts: the input is cut over the expert-tensor-parallel ranks."""

    parallel_axis = 1
