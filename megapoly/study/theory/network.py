"""Layered networks of PolyReLU units with sparse weights, whose parameters can be counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from megapoly.errors import ShapeError

# Points evaluated at once: 128 points with 50,000 units take 50 MB.
CHUNK_POINTS = 128


@dataclass(frozen=True)
class Size:
    """Number of parts of a network.

    Attributes:
        depth: hidden layers.
        width: units of the widest hidden layer.
        units: of all hidden layers.
        weights: weights and biases that are not zero, including the output's.
        coefficients: r + 1 for each unit, including zeros; 0 in a ReLU network, which has none.
    """

    depth: int
    width: int
    units: int
    weights: int
    coefficients: int

    @property
    def parameters(self) -> int:
        """Weights and coefficients."""
        return self.weights + self.coefficients


@dataclass(frozen=True)
class Layer:
    """An affine map and, except in the output layer, an activation for each unit.

    Attributes:
        weight: [units, inputs], sparse, fp64.
        bias: [units].
        coefficients: [units, r + 1], ascending powers; None for the output.
    """

    weight: Tensor
    bias: Tensor
    coefficients: Tensor | None

    def __call__(self, h: Tensor) -> Tensor:
        """Map ``h`` of [inputs, points] to [units, points]."""
        z = torch.sparse.mm(self.weight, h) + self.bias[:, None]
        return z if self.coefficients is None else _activate(z, self.coefficients)


class Network:
    """A function of [points, num_inputs]: hidden layers of PolyReLU units, then an affine map.

        h_l = sum_i a_i ReLU(W_l h_{l-1} + b_l)^i,   y = W_out h_L + b_out

    Each unit has its own coefficients. With order 1 all are (0, 1): a ReLU network. No connection
    skips a layer.

    Args:
        layers: the hidden layers, then the output.
        order: r.
    """

    def __init__(self, layers: Sequence[Layer], order: int):
        self.layers = tuple(layers)
        self.order = order

    def __call__(self, x: Tensor) -> Tensor:
        """Evaluate in fp64.

        Args:
            x: [points, num_inputs].

        Returns:
            [points, num_outputs].

        Raises:
            ShapeError: ``x`` has another shape.
        """
        num_inputs = self.layers[0].weight.shape[1]
        if x.ndim != 2 or x.shape[1] != num_inputs:
            raise ShapeError(
                f"The network takes [points, {num_inputs}], not {list(x.shape)}; "
                "a single input is a column."
            )
        return torch.cat([self._evaluate(part) for part in x.double().split(CHUNK_POINTS)])

    def _evaluate(self, x: Tensor) -> Tensor:
        h = x.T
        for layer in self.layers:
            h = layer(h)
        return h.T

    def exactly(self, point: Sequence[Fraction]) -> list[Fraction]:
        """Evaluate at one point in rational arithmetic, with the exact weights of the network."""
        zero = Fraction(0)
        h = list(point)
        for layer in self.layers:
            z = [Fraction(b) for b in layer.bias.tolist()]
            entries = layer.weight.indices().T.tolist()
            for (row, column), weight in zip(entries, layer.weight.values().tolist(), strict=True):
                z[row] += Fraction(weight) * h[column]
            if layer.coefficients is None:
                h = z
            else:
                rows = layer.coefficients.tolist()
                h = [
                    sum((Fraction(a) * max(u, zero) ** i for i, a in enumerate(row)), start=zero)
                    for u, row in zip(z, rows, strict=True)
                ]
        return h

    @property
    def size(self) -> Size:
        """The counts."""
        units = [layer.bias.numel() for layer in self.layers[:-1]]
        weights = sum(
            int(torch.count_nonzero(layer.weight.values()) + torch.count_nonzero(layer.bias))
            for layer in self.layers
        )
        return Size(
            depth=len(units),
            width=max(units, default=0),
            units=sum(units),
            weights=weights,
            coefficients=(self.order + 1) * sum(units) if self.order > 1 else 0,
        )


def _activate(z: Tensor, coefficients: Tensor) -> Tensor:
    h = z.clamp(min=0)
    y = coefficients[:, -1:].expand_as(h)
    for i in range(coefficients.shape[1] - 2, -1, -1):
        y = y * h + coefficients[:, i : i + 1]
    return y
