"""What is unusual inside a step whose loss or gradient norm is: one sentence, from all ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch.distributed as dist

from megapoly.data.loader import Batch
from megapoly.training.distributed import owns_loss
from megapoly.training.forward_inspection import Inspection, inspect_forward
from megapoly.training.gradient_shares import (
    GradientNotFinite,
    first_gradient_not_finite,
    squares_of_gradients,
)
from megapoly.training.loss import Losses
from megapoly.training.state import TrainState

# A parameter or micro-batch that is named has at least this share.
_LEAST_SHARE = 0.1
_MOST_NAMED = 3


@dataclass
class _Facts:
    """What one rank finds.

    Args:
        rank: of the job.
        grad_norm: as this rank computed it.
        losses: number in the step and loss of each micro-batch, on ranks of the last stage.
        owns_loss: its losses are in the mean; other ranks have the same ones.
        squares: of the gradient, by parameter.
        gradient: parameter whose gradient is not finite, the one nearest to the loss.
        inspection: of the forward pass; None if it was not run again.
    """

    rank: int
    grad_norm: float
    owns_loss: bool
    losses: list[tuple[int, float]] = field(default_factory=list)
    squares: dict[str, float] = field(default_factory=dict)
    gradient: GradientNotFinite | None = None
    inspection: Inspection | None = None


def describe(
    state: TrainState,
    losses: Sequence[Losses],
    batches: Sequence[Batch],
    forward: Callable[[Iterator[Batch]], Any],
    *,
    grad_norm: float,
    is_finite: bool,
) -> str:
    """Return what is unusual inside a step, on every rank; collective.

    The forward pass of its micro-batches is run again, without dropout.

    Args:
        state: before the optimizer's step; nothing that training computes is changed.
        losses: of this rank's micro-batches.
        batches: this rank's micro-batches; none: the forward pass is not run again.
        forward: runs the model on them, without gradients.
        grad_norm: as this rank computed it.
        is_finite: loss and gradient norm are finite on all ranks.
    """
    facts = _Facts(dist.get_rank(), grad_norm, owns_loss())
    replicas, replica = state.layout.data_parallel_size, state.layout.data_parallel_rank
    means = [loss["mean"].item() for loss in losses]
    facts.losses = [(i * replicas + replica, mean) for i, mean in enumerate(means)]
    facts.squares = squares_of_gradients(state)
    facts.gradient = None if is_finite else first_gradient_not_finite(state)
    if batches:
        facts.inspection = inspect_forward(state, batches, forward)
    gathered: list[Any] | None = [None] * dist.get_world_size() if facts.rank == 0 else None
    dist.gather_object(facts, gathered)
    parts: list[str] = []
    if gathered is not None:
        of_ranks: list[_Facts] = gathered
        parts += _about_spike(state, of_ranks) if is_finite else _about_first(state, of_ranks)
    texts = ["; ".join(parts)]
    dist.broadcast_object_list(texts)
    return texts[0]


def _about_spike(state: TrainState, ranks: Sequence[_Facts]) -> Iterator[str]:
    yield from _about_losses(state, ranks)
    squares: dict[str, float] = {}
    for facts in ranks:
        for name, square in facts.squares.items():
            squares[name] = squares.get(name, 0.0) + square
    total = sum(squares.values())
    largest = sorted(squares.items(), key=lambda item: -item[1])[:_MOST_NAMED]
    shares = [(name, square / total) for name, square in largest if total > 0]
    named = [f"{share:.0%} of {name}" for name, share in shares if share >= _LEAST_SHARE]
    if named:
        yield f"of the squared gradient norm {', '.join(named)}"
    yield from _about_activations(ranks)


def _about_losses(state: TrainState, ranks: Sequence[_Facts]) -> Iterator[str]:
    """Yield the micro-batch with the largest loss, if there are several."""
    losses = [(loss, number, f.rank) for f in ranks if f.owns_loss for number, loss in f.losses]
    if len(losses) > 1:
        loss, number, rank = max(losses)
        middle = median(loss for loss, *_ in losses)
        yield (
            f"largest loss of a micro-batch {loss:.6g} (median of {len(losses)} {middle:.6g}): "
            f"{_place(state, number, rank)}"
        )


def _about_activations(ranks: Sequence[_Facts]) -> Iterator[str]:
    found = [
        (entry.largest, name, entry)
        for facts in ranks
        if facts.inspection is not None
        for name, entry in facts.inspection.activations.items()
    ]
    if not found:
        return
    by_name: dict[str, float] = {}
    for largest, name, _ in found:
        by_name[name] = max(largest, by_name.get(name, 0.0))
    largest, name, entry = max(found, key=lambda item: item[0])
    text = (
        f"largest |FC1 output| {largest:.4g} before {name} (median of {len(by_name)} activations "
        f"{median(by_name.values()):.4g})"
    )
    if entry.roots:
        text += f", roots of its powers up to {_numbers(entry.roots)}"
    if 0 < len(entry.coefficients) <= _MOST_NAMED + 2:
        text += f", coefficients {_numbers(entry.coefficients)}"
    yield text


def _about_first(state: TrainState, ranks: Sequence[_Facts]) -> Iterator[str]:
    """Yield where the first value that is not finite was computed."""
    seen = [(f.inspection, f.rank) for f in ranks if f.inspection is not None]
    weights = [(each.weights[0], rank) for each, rank in seen if each.weights]
    outputs = [(each.first, rank) for each, rank in seen if each.first is not None]
    losses = [(n, f.rank) for f in ranks for n, loss in f.losses if not math.isfinite(loss)]
    if weights:
        name, rank = weights[0]
        yield f"the weights {name} are not finite, on rank {rank}"
    elif outputs:
        first, rank = min(outputs)
        place = _place(state, first.micro_batch, rank)
        yield f"the first value that is not finite is an output of {first.module}, in {place}"
    elif losses:
        number = min(losses)[0]
        alike = [rank for each, rank in losses if each == number]  # of one micro-batch
        yield f"the loss is not finite in {_place(state, number, *alike)}"
        if seen:
            yield (
                "computed again, the forward pass is finite: the fault does not follow from "
                "weights and samples; check that device"
            )
    else:
        yield from _about_backward(ranks)


def _about_backward(ranks: Sequence[_Facts]) -> Iterator[str]:
    bad = [(facts.gradient, -facts.rank) for facts in ranks if facts.gradient is not None]
    if not bad:
        return
    gradient, rank = max(bad)
    yield (
        "the forward pass is finite; in the backward pass the gradient of "
        f"{gradient.name} is the first that is not, on rank {-rank}"
    )
    norms = [facts.rank for facts in ranks if not math.isfinite(facts.grad_norm)]
    if len(norms) < len(ranks):
        yield (
            f"the norm is not finite on rank {', '.join(map(str, norms))} of {len(ranks)} only, "
            "though all have the same gradients: check that device"
        )


def _place(state: TrainState, number: int, *ranks: int) -> str:
    """Return where a micro-batch is: its ranks, its number there, and its samples."""
    layout = state.layout
    first = state.consumed_samples + number * layout.micro_batch_size
    last = first + layout.micro_batch_size - 1
    samples = f"sample {first}" if first == last else f"samples {first}-{last}"
    of_rank = f"{number // layout.data_parallel_size + 1} of {layout.num_microbatches}"
    on = ", ".join(map(str, sorted(ranks)))
    return f"micro-batch {of_rank} of rank {on} ({samples} of the data order)"


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)
