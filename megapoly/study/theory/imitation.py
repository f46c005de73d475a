"""ReLU networks that approximate PolyReLU units and networks: Lemma 2 and Theorem 2."""

from __future__ import annotations

from collections.abc import Sequence

from megapoly.errors import UnavailableError
from megapoly.study.theory.builder import Builder, Value
from megapoly.study.theory.network import Layer, Network


def square(s: Value, num_teeth: int) -> Value:
    """Approximate x^2 on [0, 1] by ReLU units, from above, within 4^-(m + 1).

    Values are in [0, 1], and 0 at 0.

        f_m(x) = x - sum_{k=1}^m g_k(x) / 4^k
        g_k = g(g_{k-1}),   g_0 = x,   g(x) = 2 ReLU(x) - 4 ReLU(x - 1/2)

    Source: Yarotsky (2017), Proposition 2. Each layer has three units: two for the sawtooth g, and
    one for the sum, which is not negative.

    Args:
        s: x, in [0, 1].
        num_teeth: m, the number of layers.
    """
    tooth, total = s, s
    for k in range(1, num_teeth + 1):
        unit = s.builder.unit
        carried = total.carried(total.layer + 1, nonnegative=True)
        tooth = 2 * unit(tooth) - 4 * unit(tooth - 0.5)
        total = carried - tooth * 0.25**k
    return total


def product(u: Value, v: Value, num_teeth: int) -> Value:
    """Approximate the product of u and v in [-1, 1], within 4^-(m + 1), in m + 1 layers.

        u v = (|u + v| / 2)^2 - (|u - v| / 2)^2

    The result is in [-1, 1], because both squares are in [0, 1], and 0 if u or v is 0.
    """
    return square(_absolute((u + v) * 0.5), num_teeth) - square(_absolute((u - v) * 0.5), num_teeth)


def _absolute(value: Value) -> Value:
    return value.builder.unit(value) + value.builder.unit(-value)


def clip(value: Value) -> Value:
    """Clip a value to [-1, 1], with two ReLU units."""
    unit = value.builder.unit
    return unit(value + 1.0) - unit(value - 1.0) - 1.0


def num_teeth_for(coefficients: Sequence[float], eps: float) -> int:
    """Return the least m for which the error of :func:`imitate_unit` is below ``eps``.

    h^i consists of i - 1 products and squares. Their errors of 4^-(m + 1) add up because factors
    are in [-1, 1], so the error is at most sum_{i>=2} |a_i| (i - 1) 4^-(m + 1) in total.
    """
    weight = sum(abs(a) * (i - 1) for i, a in enumerate(coefficients) if i >= 2)
    num_teeth = 1
    while weight * 0.25 ** (num_teeth + 1) >= eps:
        num_teeth += 1
    return num_teeth


def imitate_unit(value: Value, coefficients: Sequence[float], num_teeth: int) -> Value:
    """Approximate sum_i a_i ReLU(x)^i for x in [-1, 1] by ReLU units.

    Source: PolyCom (ICLR 2025), Lemma 2. The paper takes from Telgarsky (2017) the smaller of
    sr ln(sr / eps) and sd ln^2(dsr / eps) (its Lemma A.1) and states O(ln^2(1 / eps)). For a fixed
    order r the first is smaller. This function builds O(r ln(r / eps)) units, which is the lower
    bound of Theorem 2 up to a constant. The lemma also requires f to map to [-1, 1]; coefficients
    in [-1, 1] do not ensure this even for PolyReLU (1 + x + x^2 + x^3 is 4 at 1). :func:`clip`
    ensures it if PolyReLU itself maps to [-1, 1].
    """
    h = value.builder.unit(value)
    a = [*coefficients, 0.0, 0.0]
    result = h * a[1] + a[0]
    last = h
    for i in range(2, len(coefficients)):
        if i == 2:
            last = square(h, num_teeth)
        else:
            last = product(last, h.carried(last.layer, nonnegative=True), num_teeth)
        result = result + last * a[i]
    return result


def unit_network(coefficients: Sequence[float], eps: float) -> Network:
    """Return a ReLU network within ``eps`` of a PolyReLU unit on [-1, 1].

    Args:
        coefficients: a, ascending powers.
        eps: in (0, 1).
    """
    builder = Builder(1, order=1)
    num_teeth = num_teeth_for(coefficients, eps)
    return builder.build([imitate_unit(builder.inputs[0], coefficients, num_teeth)])


def imitate_network(network: Network, eps: float) -> Network:
    """Return a ReLU network within ``eps`` of a PolyReLU network on [-1, 1]^d.

    Layer i of L is approximated within eps / (L alpha^(L - i)); alpha >= 1 bounds the slopes.

    Source: PolyCom (ICLR 2025), Theorem 2, upper bound. Corrections to the paper: its condition
    ||a||_1 + b <= 1 must use |b|; its sums need alpha >= 1; it is not obvious that the
    approximations stay in [-1, 1], which :func:`clip` ensures here. Its lower bound,
    K L ln(1 / eps), does not follow from the Lemma A.2 that it cites, which gives ln(1 / eps); a
    lower bound cannot be built.

    Args:
        network: each unit has ||weights||_1 + |bias| <= 1 and sum_i |a_i| <= 1, so that it maps
            [-1, 1] to [-1, 1]; the output has ||weights||_1 <= 1.
        eps: in (0, 1).

    Raises:
        UnavailableError: weights or coefficients do not meet the condition of the theorem.
    """
    *hidden, output = network.layers
    _check(network)
    alpha = max(1.0, *(_slope(row) for layer in hidden for row in _coefficients(layer)))
    builder = Builder(network.layers[0].weight.shape[1], order=1)
    values = builder.inputs
    for i, layer in enumerate(hidden, start=1):
        tolerance = eps / (len(hidden) * alpha ** (len(hidden) - i))
        rows = _coefficients(layer)
        num_teeth = max(num_teeth_for(row, tolerance) for row in rows)
        values = [
            clip(imitate_unit(z, row, num_teeth))
            for z, row in zip(_affine(builder, layer, values), rows, strict=True)
        ]
    return builder.build(_affine(builder, output, values))


def _affine(builder: Builder, layer: Layer, values: Sequence[Value]) -> list[Value]:
    sums = []
    for row, bias in zip(layer.weight.to_dense().tolist(), layer.bias.tolist(), strict=True):
        total = builder.constant(bias)
        for weight, value in zip(row, values, strict=True):
            total = total + value * weight
        sums.append(total)
    return sums


def _coefficients(layer: Layer) -> list[list[float]]:
    assert layer.coefficients is not None, "only the output layer has none"
    return layer.coefficients.tolist()


def _slope(coefficients: Sequence[float]) -> float:
    """Return a bound of the slope of a unit on [-1, 1]."""
    return sum(i * abs(a) for i, a in enumerate(coefficients))


def _check(network: Network) -> None:
    """Raise if the condition of the theorem is not met; a norm of 1 may be rounded up."""
    for number, layer in enumerate(network.layers, start=1):
        norms = layer.weight.to_dense().abs().sum(1)
        if layer.coefficients is not None:
            norms = norms + layer.bias.abs()
            sums = layer.coefficients.abs().sum(1)
            if sums.max() > 1 + 1e-9:
                raise UnavailableError(
                    f"Layer {number} has a unit whose coefficients' absolute values sum to "
                    f"{sums.max():.3g}: at most 1 keeps it within [-1, 1]; scale them down."
                )
        if norms.max() > 1 + 1e-9:
            raise UnavailableError(
                f"Layer {number} has a unit whose weights' and bias's absolute values sum to "
                f"{norms.max():.3g}: the theorem takes at most 1; scale them down."
            )
