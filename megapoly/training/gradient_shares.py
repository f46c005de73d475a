"""Which parameters the gradient norm of a step comes from."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.optimizer import (
    DistributedOptimizer,
    Float16OptimizerWithFloat16Params,
    MegatronOptimizer,
)
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor

from megapoly.training.names import named_parameters, pipeline_stage
from megapoly.training.state import TrainState

# Local experts, which have the same numbers on every expert-parallel rank.
_EXPERT = re.compile(r"(?<=weight)\d+$|\.local_experts\.\d+")


def squares_of_gradients(state: TrainState) -> dict[str, float]:
    """Return this rank's share of the squared gradient norm, by the parameter's name.

    Over all ranks, each element of the gradient is counted once, as in the norm. The experts of a
    layer are one parameter.

    Args:
        state: its optimizer has the gradients
            (:func:`megapoly.training.optimizer.gradient_norm`).
    """
    names = {id(parameter): name for name, parameter in named_parameters(state.chunks)}
    squares: dict[str, float] = {}
    for part in _parts(state.optimizer):
        for parameter, main in _with_main(part):
            if main.grad is None or not _counts(part, parameter, main):
                continue
            name = _EXPERT.sub("", names[id(parameter)])
            norm = torch.linalg.vector_norm(main.grad.detach(), dtype=torch.float64).item()
            squares[name] = squares.get(name, 0.0) + norm**2
    return squares


@dataclass(order=True, frozen=True)
class GradientNotFinite:
    """A parameter whose gradient is not finite on a rank.

    Args:
        stage: chunk of the pipeline that has it, in the order of the layers.
        number: of the parameter within its chunk, in the order of the layers.
        name: in the whole model.
    """

    stage: int
    number: int
    name: str


def first_gradient_not_finite(state: TrainState) -> GradientNotFinite | None:
    """Return the parameter nearest to the loss whose gradient is not finite on this rank.

    The backward pass runs from the loss to the embedding: parameters before it got what is not
    finite from it.
    """
    not_finite = {
        id(parameter)
        for part in _parts(state.optimizer)
        for parameter, main in _with_main(part)
        if main.grad is not None and not main.grad.isfinite().all()
    }
    found = [
        GradientNotFinite(pipeline_stage(i), number, name)
        for i, chunk in enumerate(state.chunks)
        for number, (name, parameter) in enumerate(named_parameters([chunk]))
        if id(parameter) in not_finite
    ]
    return max(found, default=None)


def _parts(optimizer: MegatronOptimizer) -> Iterator[MegatronOptimizer]:
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if not part.is_stub_optimizer:
            yield part


def _with_main(part: MegatronOptimizer) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each parameter of the model with what the optimizer updates for it."""
    if isinstance(part, DistributedOptimizer):
        pairs = [
            (part.model_float16_groups, part.shard_fp32_from_float16_groups),
            (part.model_fp32_groups, part.shard_fp32_groups),
        ]
    elif isinstance(part, Float16OptimizerWithFloat16Params):
        pairs = [
            (part.float16_groups, part.fp32_from_float16_groups),
            (part.fp32_from_fp32_groups, part.fp32_from_fp32_groups),
        ]
    else:
        own = [part.get_parameters()]
        pairs = [(own, own)]
    for models, mains in pairs:
        for model_group, main_group in zip(models, mains, strict=True):
            yield from zip(model_group, main_group, strict=True)


def _counts(part: MegatronOptimizer, parameter: Tensor, main: Tensor) -> bool:
    """Return whether the gradient norm counts a gradient on this rank.

    As MegatronOptimizer.get_main_grads_for_grad_norm (optimizer/optimizer.py:136). Its sum is over
    the ranks of one replica, or with the distributed optimizer, whose shards differ, over all.
    """
    if not isinstance(part, DistributedOptimizer):
        is_expert = not getattr(parameter, "allreduce", True)
        replica = (
            parallel_state.get_expert_data_parallel_rank()
            if is_expert
            else parallel_state.get_data_parallel_rank(with_context_parallel=True)
        )
        if replica != 0:
            return False
    tp_group = getattr(part, "tp_group", None)
    return param_is_not_shared(main) and param_is_not_tensor_parallel_duplicate(main, tp_group)
