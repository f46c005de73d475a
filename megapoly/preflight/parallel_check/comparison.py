"""Relative differences between two training runs of the same model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

from torch import Tensor

from megapoly.preflight.parallel_check.job import Step


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """Largest relative differences that rounding explains.

    Args:
        loss: for cross-entropy and router losses.
        grad_norm: for the global gradient norm.
        gradient: for each parameter's gradient, |g - g'| / |g| in the L2 norm.
    """

    loss: float
    grad_norm: float
    gradient: float


_LAYERS = "decoder.layers."

FP32 = Tolerance(loss=1e-5, grad_norm=1e-5, gradient=1e-5)
BF16 = Tolerance(loss=5e-3, grad_norm=1e-2, gradient=3e-1)


@dataclasses.dataclass
class Differences:
    """Largest relative differences over all steps.

    Args:
        loss: of any loss.
        grad_norm: of the gradient norm.
        gradients: of each layer's parameters and the embeddings, from the input to the output.
        disagreements: how much ranks differ that must hold the same gradient to the bit.
    """

    loss: float
    grad_norm: float
    gradients: dict[str, float]
    disagreements: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def worst_gradient(self) -> float:
        """Largest difference of any parameter; NaN if any is NaN."""
        return _largest(self.gradients.values())

    def first_beyond(self, tolerance: Tolerance) -> str | None:
        """Return the first parameter, in the model's order, whose gradient is beyond tolerance."""
        limit = tolerance.gradient
        beyond = (name for name, value in self.gradients.items() if not value <= limit)
        return next(beyond, None)

    def is_within(self, tolerance: Tolerance) -> bool:
        """Return whether every difference is within tolerance, and ranks agree to the bit."""
        return (
            not self.disagreements
            and self.loss <= tolerance.loss
            and self.grad_norm <= tolerance.grad_norm
            and self.worst_gradient <= tolerance.gradient
        )


def compare(actual: Sequence[Step], expected: Sequence[Step]) -> Differences:
    """Compare step by step; both must have the same losses and parameters."""
    losses, norms = [], []
    gradients: dict[str, list[float]] = {name: [] for name in _by_layer(expected[0].gradients)}
    for a, e in zip(actual, expected, strict=True):
        assert a.losses.keys() == e.losses.keys() and a.gradients.keys() == e.gradients.keys()
        losses += [
            _relative(abs(a.losses[name] - e.losses[name]), e.losses[name]) for name in e.losses
        ]
        norms.append(_relative(abs(a.grad_norm - e.grad_norm), e.grad_norm))
        pairs = _by_layer(a.gradients), _by_layer(e.gradients)
        for name, values in gradients.items():
            values.append(_difference(*(of_run[name] for of_run in pairs)))
    return Differences(
        _largest(losses),
        _largest(norms),
        {name: _largest(values) for name, values in gradients.items()},
        {name: value for step in actual for name, value in step.disagreements.items()},
    )


def _by_layer(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Split the parameters by layer: a checkpoint has one tensor for all layers."""
    stacked = {name: g for name, g in gradients.items() if name.startswith(_LAYERS)}
    before: dict[str, Tensor] = {}
    after: dict[str, Tensor] = {}
    for name in gradients.keys() - stacked.keys():
        (before if name.startswith("embedding.") else after)[name] = gradients[name]
    num_layers = max((len(gradient) for gradient in stacked.values()), default=0)
    layers = {
        name.replace(_LAYERS, f"{_LAYERS}{layer}.", 1): gradient[layer]
        for layer in range(num_layers)
        for name, gradient in stacked.items()
    }
    return {**before, **layers, **dict(sorted(after.items()))}


def _difference(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.double(), expected.double()
    return _relative((actual - expected).norm().item(), expected.norm().item())


def _largest(values: Iterable[float]) -> float:
    """Return the largest value; NaN if any is NaN."""
    values = list(values)
    return math.nan if any(math.isnan(value) for value in values) else max(values)


def _relative(difference: float, size: float) -> float:
    if difference == 0.0:
        return 0.0
    return difference / abs(size) if size else math.inf
