"""FFN activations by name. To add one, add an entry to :data:`ACTIVATIONS`.

| name | formula (x: first half of FC1's output, u: second half, only if gated) |
|---|---|
| swiglu, geglu | silu(x) u, gelu(x) u |
| gelu, silu, relu, squared_relu | of x, no coefficients |
| polyrelu | a0 + a1 h + .. + ar h^r, h = relu(x) |
| polyprelu | the same with h = prelu(x) and a learned slope |
| polynorm | a0 + a1 n(x) + .. + ar n(x^r), n over the whole FFN width |
| polyrelunorm | polynorm of relu(x) |
| gated_polynorm | polynorm(x) u |
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import NamedTuple

import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.distributed import ProcessGroup

from megapoly.errors import ConfigError
from megapoly.ops import polynorm, polyrelu
from megapoly.polynomial import DEFAULT_EPS, DEFAULT_SLOPE, Backend, Norm, initial_coefficients


class ActivationInputs(NamedTuple):
    """Inputs of one call of an activation; those after ``probs`` are for one with coefficients.

    Args:
        x: [..., d / tp], the activated half.
        gate: of the shape of ``x``, multiplied in; only if the activation is gated.
        probs: one per row, multiplied in; routed experts only.
        coefficients: learned vectors by name, [n] or [experts, n].
        offsets: [experts + 1], with one set per expert.
        group: ranks that share a row.
        eps: see :func:`megapoly.ops.polynorm`; the other options as well.
        norm: ``rms`` or ``l2``.
        deterministic: give the same bits on any number of ranks.
        backend: of the operator.
    """

    x: Tensor
    gate: Tensor | None = None
    probs: Tensor | None = None
    coefficients: Mapping[str, Tensor] = MappingProxyType({})
    offsets: Tensor | None = None
    group: ProcessGroup | None = None
    eps: float = DEFAULT_EPS
    norm: Norm = "rms"
    deterministic: bool = False
    backend: Backend = "auto"


class TensorParallelSum(Enum):
    """Sums of an activation over the tensor-parallel ranks that share a row."""

    NOTHING = "nothing: pointwise, no coefficients"
    GRADIENTS = "gradients of coefficients and probabilities"
    STATISTICS = "row statistics forward, gradient sums backward"


@dataclass(frozen=True)
class Activation:
    """One entry of the registry.

    Args:
        function: computes the output, [..., d / tp] in the dtype of ``x``.
        gated: FC1 is twice as wide and its second half multiplies the result.
        coefficients: initial values of every learned vector, by name, for a given order.
        tensor_parallel_sum: see :class:`TensorParallelSum`.
        hidden_act: transformers' name of it in a gated FFN such as Llama's; None: it has none.
        keeps_input: whether the backward pass needs the input, and not the output alone.
        title: name in tables and figures.
    """

    function: Callable[[ActivationInputs], Tensor]
    gated: bool = False
    coefficients: Callable[[int], dict[str, list[float]]] | None = None
    tensor_parallel_sum: TensorParallelSum = TensorParallelSum.NOTHING
    hidden_act: str | None = None
    keeps_input: bool = True
    title: str = ""

    @property
    def has_coefficients(self) -> bool:
        """Whether the activation has learned coefficients."""
        return self.coefficients is not None

    @property
    def normalized(self) -> bool:
        """Whether the activation normalises over the FFN width."""
        return self.tensor_parallel_sum is TensorParallelSum.STATISTICS


def _pointwise(function: Callable[[Tensor], Tensor]) -> Callable[[ActivationInputs], Tensor]:
    def activate(inputs: ActivationInputs) -> Tensor:
        y = function(inputs.x)
        if inputs.gate is not None:
            y = y * inputs.gate
        return y if inputs.probs is None else (y * inputs.probs.unsqueeze(-1)).to(y.dtype)

    return activate


def _squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _polynorm(inputs: ActivationInputs) -> Tensor:
    return polynorm(
        inputs.x,
        inputs.coefficients["coefficients"],
        eps=inputs.eps,
        norm=inputs.norm,
        group=inputs.group,
        offsets=inputs.offsets,
        probs=inputs.probs,
        gate=inputs.gate,
        deterministic=inputs.deterministic,
        backend=inputs.backend,
    )


def _polyrelunorm(inputs: ActivationInputs) -> Tensor:
    return _polynorm(inputs._replace(x=F.relu(inputs.x)))


def _polyrelu(inputs: ActivationInputs) -> Tensor:
    return polyrelu(
        inputs.x,
        inputs.coefficients["coefficients"],
        slope=inputs.coefficients.get("slope"),
        group=inputs.group,
        offsets=inputs.offsets,
        probs=inputs.probs,
        gate=inputs.gate,
        deterministic=inputs.deterministic,
        backend=inputs.backend,
    )


def _ascending(order: int) -> dict[str, list[float]]:
    return {"coefficients": initial_coefficients(order)}


def _ascending_with_slope(order: int) -> dict[str, list[float]]:
    return {**_ascending(order), "slope": [DEFAULT_SLOPE]}


_GRADIENTS, _STATISTICS = TensorParallelSum.GRADIENTS, TensorParallelSum.STATISTICS

ACTIVATIONS: dict[str, Activation] = {
    "swiglu": Activation(_pointwise(F.silu), gated=True, hidden_act="silu", title="SwiGLU"),
    "geglu": Activation(_pointwise(F.gelu), gated=True, hidden_act="gelu", title="GEGLU"),
    "gelu": Activation(_pointwise(F.gelu), title="GELU"),
    "silu": Activation(_pointwise(F.silu), title="SiLU"),
    "relu": Activation(_pointwise(F.relu), keeps_input=False, title="ReLU"),
    "squared_relu": Activation(_pointwise(_squared_relu), title="ReLU²"),
    "polyrelu": Activation(_polyrelu, False, _ascending, _GRADIENTS, title="PolyReLU"),
    "polyprelu": Activation(_polyrelu, False, _ascending_with_slope, _GRADIENTS, title="PolyPReLU"),
    "polynorm": Activation(_polynorm, False, _ascending, _STATISTICS, title="PolyNorm"),
    "polyrelunorm": Activation(_polyrelunorm, False, _ascending, _STATISTICS, title="PolyReLUNorm"),
    "gated_polynorm": Activation(_polynorm, True, _ascending, _STATISTICS, title="gated PolyNorm"),
}


def get(name: str) -> Activation:
    """Return an entry of the registry.

    Raises:
        ConfigError: ``name`` is not in the registry.
    """
    if name not in ACTIVATIONS:
        near = difflib.get_close_matches(name, ACTIVATIONS, n=1, cutoff=0.0)[0]
        raise ConfigError(
            [
                f"`model.activation` ({name}) is not one of {', '.join(ACTIVATIONS)}; the nearest "
                f"is {near}"
            ]
        )
    return ACTIVATIONS[name]
