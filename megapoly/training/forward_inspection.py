"""What a forward pass has inside: first values that are not finite, and inputs of activations."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megapoly.data.loader import Batch
from megapoly.model.builder import decoder_layers, unwrap
from megapoly.model.ffn_activation import FFNActivation
from megapoly.training.names import in_whole_model, named_parameters, pipeline_stage
from megapoly.training.state import TrainState, evaluation_mode

# Rows of an activation whose powers are in memory at once, in fp64.
_ROWS = 256


@dataclass(order=True, frozen=True)
class NotFinite:
    """The first output of a module that is not finite, of a rank's.

    Args:
        micro_batch: of the step, counted over all data-parallel ranks, from 0.
        stage: chunk of the pipeline, in the order of the layers.
        module: its name in the whole model.
    """

    micro_batch: int
    stage: int
    module: str


@dataclass
class ActivationInput:
    """Largest values at the input of an activation, over the micro-batches of a rank.

    Args:
        largest: largest absolute value of FC1's output, on this rank.
        roots: largest over rows of the root of each power, which PolyNorm divides by; else empty.
        coefficients: of the activation, flat.
    """

    largest: float = 0.0
    roots: list[float] = field(default_factory=list)
    coefficients: list[float] = field(default_factory=list)


@dataclass
class Inspection:
    """Result of :func:`inspect_forward` on one rank.

    Args:
        weights: parameters that are not finite.
        first: of this rank's modules; None if all outputs are finite.
        activations: by the activation's name in the whole model.
    """

    weights: list[str] = field(default_factory=list)
    first: NotFinite | None = None
    activations: dict[str, ActivationInput] = field(default_factory=dict)


def inspect_forward(
    state: TrainState, batches: Sequence[Batch], forward: Callable[[Iterator[Batch]], Any]
) -> Inspection:
    """Run the forward pass of a step again and look inside; collective.

    It runs without dropout, and changes nothing that training computes.

    Args:
        state: before the optimizer's step.
        batches: this rank's micro-batches of the step.
        forward: runs the model on them, without gradients.
    """
    result = Inspection(_weights_not_finite(state))
    with evaluation_mode(state, are_gathered=True), contextlib.ExitStack() as hooks:
        found: list[NotFinite] = []
        for i, chunk in enumerate(state.chunks):
            _watch_outputs(state, i, chunk, found, hooks)
        _watch_activations(state, result.activations, hooks)
        forward(iter(batches))
    result.first = min(found, default=None)
    return result


def _weights_not_finite(state: TrainState) -> list[str]:
    parameters = named_parameters(state.chunks)
    return [name for name, parameter in parameters if not parameter.isfinite().all()]


def _watch_outputs(
    state: TrainState,
    number: int,
    chunk: torch.nn.Module,
    found: list[NotFinite],
    hooks: contextlib.ExitStack,
) -> None:
    """Note the first output that is not finite of each micro-batch of a chunk."""
    model = unwrap(chunk)
    replicas = state.layout.data_parallel_size
    stage = pipeline_stage(number)
    seen: set[int] = set()
    count = -1

    def begin(*_: Any) -> None:
        nonlocal count
        count += 1

    def look(name: str, outputs: Any) -> None:
        if count in seen or all(tensor.isfinite().all() for tensor in _tensors(outputs)):
            return
        seen.add(count)
        micro_batch = count * replicas + state.layout.data_parallel_rank
        found.append(NotFinite(micro_batch, stage, in_whole_model(chunk, name)))

    hooks.callback(model.register_forward_pre_hook(begin).remove)
    for name, module in model.named_modules():
        handle = module.register_forward_hook(
            lambda _module, _inputs, outputs, name=name: look(name or "the loss", outputs)
        )
        hooks.callback(handle.remove)


def _tensors(outputs: Any) -> Iterator[Tensor]:
    """Yield the floating-point tensors of a module's output."""
    if isinstance(outputs, Tensor):
        if outputs.is_floating_point():
            yield outputs
    elif isinstance(outputs, tuple | list):
        for each in outputs:
            yield from _tensors(each)


def _watch_activations(
    state: TrainState, found: dict[str, ActivationInput], hooks: contextlib.ExitStack
) -> None:
    for layer in decoder_layers(state.chunks):
        for name, module in layer.named_modules():
            if isinstance(module, FFNActivation):
                full = f"decoder.layers.{layer.layer_number - 1}.{name}"
                found[full] = ActivationInput(coefficients=_coefficients(module))

                def look(module: Any, inputs: Any, of: ActivationInput = found[full]) -> None:
                    _add(of, module, inputs[0])

                hooks.callback(module.register_forward_pre_hook(look).remove)


def _coefficients(module: FFNActivation) -> list[float]:
    values = [getattr(module, name).detach().float().flatten() for name in module.coefficient_names]
    return torch.cat(values).tolist() if values else []


def _add(found: ActivationInput, module: FFNActivation, x: Tensor) -> None:
    """Count FC1's output of one micro-batch: [..., d / tp], or [..., 2 d / tp] if gated."""
    if not x.numel():
        return  # no token was routed to the experts of this rank
    found.largest = _largest([found.largest, x.abs().amax().item()])
    if not module.activation.normalized:
        return
    first = x.chunk(2, dim=-1)[0] if module.activation.gated else x
    chunks = first.reshape(-1, first.shape[-1]).split(_ROWS)
    roots = torch.stack([_roots(module, rows.double()) for rows in chunks]).amax(0).tolist()
    found.roots = [_largest(pair) for pair in zip(found.roots or roots, roots, strict=True)]


def _largest(values: Iterable[float]) -> float:
    """Return the largest value, or NaN if there is one; `max` may return either."""
    return torch.tensor(list(values), dtype=torch.float64).amax().item()


def _roots(module: FFNActivation, rows: Tensor) -> Tensor:
    """Return the largest divisor of each power: sqrt(mean(x^2i) + eps), i = 1 .. r, over rows.

    Args:
        module: its row group has the other columns, and calls this for the same rows.
        rows: [n, d / tp], fp64.
    """
    powers = range(1, module.settings.order + 1)
    sums = torch.stack([rows.pow(2 * i).sum(-1) for i in powers])  # [r, n]
    width = rows.shape[-1]
    if (size := module.row_group.size()) > 1:
        dist.all_reduce(sums, group=module.row_group)
        width *= size
    divisor = width if module.settings.norm == "rms" else 1
    return (sums / divisor + module.settings.eps).sqrt().amax(-1)
