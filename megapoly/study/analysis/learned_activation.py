"""An activation with its learned coefficients, and its parts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megapoly.activations.registry import Activation, ActivationInputs

_COEFFICIENTS = "coefficients"


class LearnedActivation:
    """One set of coefficients of one layer, with the registry's function in plain PyTorch.

    For a gated activation, all methods describe the function of the gate.

    Args:
        activation: entry of the registry.
        coefficients: learned vectors by name, each [n].
        options: ``eps`` and ``norm`` of a normalised activation.
    """

    def __init__(
        self,
        activation: Activation,
        coefficients: dict[str, Tensor],
        options: dict[str, Any] | None = None,
    ) -> None:
        self.activation = activation
        # A few numbers, which are moved to the device of each x.
        self._learned = {k: v.detach().float().cpu() for k, v in coefficients.items()}
        self._options = {"backend": "reference", **(options or {})}

    @property
    def coefficients(self) -> Tensor | None:
        """[r + 1], ascending powers; None without coefficients."""
        return self._learned.get(_COEFFICIENTS)

    def __call__(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """[n, d] -> [n, d], times the other factor of a gate if it is given."""
        return self.activation.function(self._inputs(x, gate))

    def power(self, x: Tensor, i: int) -> Tensor:
        """Return the term of the output that a_i multiplies: n(x^i), h^i, or 1 for i = 0."""
        learned = self.coefficients
        assert learned is not None
        only = torch.zeros_like(learned)
        only[i] = 1.0
        return self.activation.function(self._inputs(x, None, {_COEFFICIENTS: only}))

    def row_norms(self, x: Tensor) -> Tensor:
        """Return the divisor of each power of each row: sqrt(mean(x^2i) + eps), i = 1 .. r.

            q_i = sqrt(sum_j x_j^2i / sum_j p_ij^2)   over columns whose term p_ij is not zero

        It is derived from the output, so it holds for every normalised activation of the registry.

        Args:
            x: [n, d], fp64.

        Returns:
            [n, r]; NaN for a row whose terms are all zero.
        """
        learned = self.coefficients
        assert learned is not None
        norms = []
        for i in range(1, len(learned)):
            part = self.power(x, i)
            counted = torch.where(part != 0, x**i, 0.0)
            norms.append((counted.square().sum(-1) / part.square().sum(-1)).sqrt())
        return torch.stack(norms, dim=-1)

    def curve(self, x: Tensor, norms: Tensor | None = None) -> Tensor:
        """Compute the activation as a function of one pre-activation.

            y = a0 + sum_i a_i h(x)^i / q_i

        Args:
            x: [n] fp64.
            norms: [r], q_i of a normalised activation, because its output depends on the whole row.

        Returns:
            [n] fp64.
        """
        if norms is None:
            return self(x[None])[0]
        learned = self.coefficients
        assert learned is not None
        own = self.row_norms(x[None])[0].nan_to_num(0.0)  # of x as if it were a row
        y = learned[0].double().expand_as(x)
        for i in range(1, len(learned)):
            y = y + learned[i].double() * self.power(x[None], i)[0] * own[i - 1] / norms[i - 1]
        return y

    def _inputs(
        self, x: Tensor, gate: Tensor | None, others: dict[str, Tensor] | None = None
    ) -> ActivationInputs:
        values = {k: v.to(x.device) for k, v in (self._learned | (others or {})).items()}
        return ActivationInputs(x, gate, coefficients=values, **self._options)
