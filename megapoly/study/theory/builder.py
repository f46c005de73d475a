"""Networks written as expressions: values are affine in the units of a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from megapoly.study.theory.network import Layer, Network

IDENTITY = (0.0, 1.0)


@dataclass(frozen=True, eq=False)
class Value:
    """An affine function of the units of one layer (0: the inputs); a constant has no terms.

    Values of different layers can be added: the earlier one is carried to the later layer, because
    no connection skips a layer.
    """

    builder: Builder
    layer: int
    terms: dict[int, float] = field(default_factory=dict)
    constant: float = 0.0

    def __add__(self, other: Value | float) -> Value:
        if not isinstance(other, Value):
            return Value(self.builder, self.layer, self.terms, self.constant + other)
        layer = max(self.layer, other.layer)
        one, two = self.carried(layer), other.carried(layer)
        terms = dict(one.terms)
        for unit, weight in two.terms.items():
            terms[unit] = terms.get(unit, 0.0) + weight
        terms = {unit: weight for unit, weight in terms.items() if weight}
        return Value(self.builder, layer, terms, one.constant + two.constant)

    def __mul__(self, factor: float) -> Value:
        terms = {unit: weight * factor for unit, weight in self.terms.items() if weight * factor}
        return Value(self.builder, self.layer, terms, self.constant * factor)

    __radd__, __rmul__ = __add__, __mul__

    def __neg__(self) -> Value:
        return self * -1.0

    def __sub__(self, other: Value | float) -> Value:
        return self + -other

    def __rsub__(self, other: float) -> Value:
        return -self + other

    def carried(self, layer: int, *, nonnegative: bool = False) -> Value:
        """Return the same value in a later layer, by v = ReLU(v) - ReLU(-v) in each layer between.

        Args:
            layer: in which the value is needed.
            nonnegative: v >= 0 is known, so v = ReLU(v) needs one unit in each layer, not two.
        """
        value = self
        while value.layer < layer and value.terms:
            positive = self.builder.unit(value)
            value = positive if nonnegative else positive - self.builder.unit(-value)
        return value if value.terms else Value(self.builder, layer, {}, value.constant)


class Builder:
    """Collects units, layer by layer.

    Args:
        num_inputs: d.
        order: r, of the PolyReLU units; 1 for a ReLU network.
    """

    def __init__(self, num_inputs: int, order: int):
        self.order = order
        self.inputs = [Value(self, 0, {i: 1.0}) for i in range(num_inputs)]
        self._layers: list[list[tuple[Value, tuple[float, ...]]]] = []
        self._known: dict[tuple[object, ...], int] = {}

    def constant(self, value: float) -> Value:
        """Return a constant value."""
        return Value(self, 0, {}, value)

    def unit(self, value: Value, coefficients: Sequence[float] = IDENTITY) -> Value:
        """Return the output of a unit, sum_i a_i ReLU(value)^i; equal units are shared."""
        a = tuple(coefficients)
        assert len(a) <= self.order + 1, "the order of a unit is at most that of the network"
        if not value.terms:
            h = max(value.constant, 0.0)
            return self.constant(sum(c * h**i for i, c in enumerate(a)))
        key = (value.layer, tuple(sorted(value.terms.items())), value.constant, a)
        if key not in self._known:
            if value.layer == len(self._layers):
                self._layers.append([])
            self._known[key] = len(self._layers[value.layer])
            self._layers[value.layer].append((value, a))
        return Value(self, value.layer + 1, {self._known[key]: 1.0})

    def build(self, outputs: Sequence[Value]) -> Network:
        """Return the network that computes ``outputs``."""
        depth = max(value.layer for value in outputs)
        outputs = [value.carried(depth) for value in outputs]
        layers = []
        num_inputs = len(self.inputs)
        for units in self._layers[:depth]:
            rows = [a + (0.0,) * (self.order + 1 - len(a)) for _, a in units]
            coefficients = torch.tensor(rows, dtype=torch.float64)
            layers.append(_layer([value for value, _ in units], num_inputs, coefficients))
            num_inputs = len(units)
        return Network([*layers, _layer(outputs, num_inputs, None)], self.order)


def _layer(values: Sequence[Value], num_inputs: int, coefficients: torch.Tensor | None) -> Layer:
    entries = [(row, i, w) for row, value in enumerate(values) for i, w in value.terms.items()]
    rows, columns, weights = zip(*entries, strict=True) if entries else ((), (), ())
    weight = torch.sparse_coo_tensor(
        torch.tensor([rows, columns], dtype=torch.int64),
        torch.tensor(weights, dtype=torch.float64),
        (len(values), num_inputs),
        check_invariants=True,
    ).coalesce()
    bias = torch.tensor([value.constant for value in values], dtype=torch.float64)
    return Layer(weight, bias, coefficients)
