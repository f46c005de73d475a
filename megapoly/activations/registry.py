"""Every FFN activation by name. A new activation is one entry in :data:`ACTIVATIONS`.

| name | formula (x: first half of FC1's output, u: second half, only where gated) |
|---|---|
| swiglu, geglu | silu(x) u, gelu(x) u |
| gelu, silu, relu, squared_relu | of x, no coefficients |
| polyrelu | a0 + a1 h + .. + ar h^r, h = relu(x) |
| polyprelu | the same with h = prelu(x), learned slope |
| polynorm | a0 + a1 n(x) + .. + ar n(x^r), n over the whole FFN width |
| polyrelunorm | polynorm of relu(x) |
| gated_polynorm | polynorm(x) u |
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from megapoly.errors import ConfigError
from megapoly.ops import polynorm, polyrelu


class TensorParallelSum(Enum):
    """What an activation adds up over the tensor-parallel ranks that share a row."""

    NOTHING = "nothing: pointwise, no coefficients"
    GRADIENTS = "gradients of coefficients and probabilities"
    STATISTICS = "row statistics forward, gradient sums backward"


@dataclass(frozen=True)
class Activation:
    """One entry of the registry.

    Args:
        function: ``function(x, *, gate, probs, **coefficients)``; with coefficients it also takes
            ``group``, ``offsets``, ``deterministic`` and ``backend``, and with STATISTICS ``eps``
            and ``norm``.
        gated: FC1 is twice as wide and its second half multiplies the result.
        coefficients: initial values of every learned vector, by name, for a given order.
        tensor_parallel_sum: see :class:`TensorParallelSum`.
        hidden_act: transformers' name of it in a gated FFN such as Llama's; None: it has none.
        keeps_input: whether its backward pass needs its input, and not its output alone.
        title: its name as a reader writes it, for tables and figures.
    """

    function: Callable[..., Tensor]
    gated: bool = False
    coefficients: Callable[[int], dict[str, list[float]]] | None = None
    tensor_parallel_sum: TensorParallelSum = TensorParallelSum.NOTHING
    hidden_act: str | None = None
    keeps_input: bool = True
    title: str = ""

    @property
    def has_coefficients(self) -> bool:
        """Whether it learns anything."""
        return self.coefficients is not None

    @property
    def normalized(self) -> bool:
        """Whether it normalises over the FFN width."""
        return self.tensor_parallel_sum is TensorParallelSum.STATISTICS


def _pointwise(function: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def apply(x: Tensor, *, gate: Tensor | None = None, probs: Tensor | None = None) -> Tensor:
        y = function(x)
        if gate is not None:
            y = y * gate
        return y if probs is None else (y * probs.unsqueeze(-1)).to(y.dtype)

    return apply


def _squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _polyrelunorm(x: Tensor, coefficients: Tensor, **kwargs: Any) -> Tensor:
    return polynorm(F.relu(x), coefficients, **kwargs)


def _ascending(order: int) -> dict[str, list[float]]:
    """a0 = 0 and a1 .. ar = 1 / r (section 2 of the paper)."""
    return {"coefficients": [0.0] + [1.0 / order] * order}


def _ascending_with_slope(order: int) -> dict[str, list[float]]:
    return {**_ascending(order), "slope": [0.25]}


_GRADIENTS, _STATISTICS = TensorParallelSum.GRADIENTS, TensorParallelSum.STATISTICS

ACTIVATIONS: dict[str, Activation] = {
    "swiglu": Activation(_pointwise(F.silu), gated=True, hidden_act="silu", title="SwiGLU"),
    "geglu": Activation(_pointwise(F.gelu), gated=True, hidden_act="gelu", title="GEGLU"),
    "gelu": Activation(_pointwise(F.gelu), title="GELU"),
    "silu": Activation(_pointwise(F.silu), title="SiLU"),
    "relu": Activation(_pointwise(F.relu), keeps_input=False, title="ReLU"),
    "squared_relu": Activation(_pointwise(_squared_relu), title="ReLU²"),
    "polyrelu": Activation(polyrelu, False, _ascending, _GRADIENTS, title="PolyReLU"),
    "polyprelu": Activation(polyrelu, False, _ascending_with_slope, _GRADIENTS, title="PolyPReLU"),
    "polynorm": Activation(polynorm, False, _ascending, _STATISTICS, title="PolyNorm"),
    "polyrelunorm": Activation(_polyrelunorm, False, _ascending, _STATISTICS, title="PolyReLUNorm"),
    "gated_polynorm": Activation(polynorm, True, _ascending, _STATISTICS, title="gated PolyNorm"),
}


def get(name: str) -> Activation:
    """Entry of the registry.

    Raises:
        ConfigError: there is no activation of that name.
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
