"""Inputs and outputs of one activation on text: curve, shares of the powers, statistics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megapoly.study.analysis.histogram import GrowingHistogram
from megapoly.study.analysis.learned_activation import LearnedActivation
from megapoly.study.analysis.row_statistics import RowStatistics

# The curve covers these quantiles of the pre-activations, at about this many points.
QUANTILES = (1e-4, 1 - 1e-4)
NUM_POINTS = 160
# A slope below this share of the root mean square slope passes almost no gradient.
FLAT = 0.01


class ActivationStatistics:
    """Collects the inputs of an activation, one row for each token.

    The output excludes the router's probability, so that dense models, MoE models and experts can
    be compared. It is computed in fp32 by the reference operators.

    Args:
        function: the activation with its learned coefficients.
    """

    def __init__(self, function: LearnedActivation) -> None:
        self._function = function
        self._before, self._after = RowStatistics(), RowStatistics()
        self._histogram = GrowingHistogram()
        self._norms: list[Tensor] = []
        learned = function.coefficients
        self._squares = torch.zeros(0 if learned is None else len(learned), dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """Count rows of the output of FC1: [n, d], or [n, 2 d] if gated, the gate first."""
        if not len(x):
            return
        function, gate = self._function, None
        x = x.float()
        if function.activation.gated:
            x, gate = x.chunk(2, dim=-1)
        self._before.add(x)
        self._after.add(function(x, gate))
        self._histogram.add(x)
        learned = function.coefficients
        if learned is None:
            return
        for i, a in enumerate(learned.tolist()):
            self._squares[i] += (a * function.power(x, i)).double().square().mean(-1).sum().cpu()
        if function.activation.normalized:
            self._norms.append(function.row_norms(x.double()).cpu())

    @property
    def is_empty(self) -> bool:
        """Whether no token was counted."""
        return not int(self._histogram.counts.sum())

    def statistics(self) -> dict[str, Any]:
        """Return statistics of saturation and outliers.

        Returns:
            ``before``: of the pre-activations that the function gets; ``after``: of the input of
            FC2, for a gated activation the product; both as :meth:`RowStatistics.result`. ``flat``:
            the share of pre-activations at which the slope of the curve is below 0.01 of the root
            mean square slope over all of them; the slope is the rise of the curve over a bin of the
            histogram.
        """
        edges, counts = self._histogram.edges, self._histogram.counts.double()
        slopes = self._curve(edges).diff() / edges.diff()
        seen = counts > 0
        total = counts.sum()
        typical = ((slopes.square() * counts)[seen].sum() / total).sqrt()
        flat = counts[seen & (slopes.abs() < FLAT * typical)].sum() / total
        return {
            "before": self._before.result(),
            "after": self._after.result(),
            "flat": flat.item(),
        }

    def curve(self) -> dict[str, Any]:
        """Return the learned function over the pre-activations, and their density.

        Returns:
            ``x``, ``y``; ``density`` at x, whose integral over all pre-activations is 1. x covers
            the 0.0001 to the 0.9999 quantile. ``norms``: the q_i of :meth:`LearnedActivation.curve`
            of a normalised activation, which are the median over rows of the root mean square of
            each power; else null.
        """
        histogram = self._histogram
        first, last = histogram.bins_between(*QUANTILES)
        step = max(1, -(-(last - first) // NUM_POINTS))
        last = min(first + step * -(-(last - first) // step), len(histogram.counts))
        starts = torch.arange(first, last, step)
        ends = (starts + step).clamp_max(last)
        below = torch.nn.functional.pad(histogram.counts.cumsum(0), (1, 0)).double()
        edges = histogram.edges
        widths = edges[ends] - edges[starts]
        x = (edges[ends] + edges[starts]) / 2
        density = (below[ends] - below[starts]) / (widths * histogram.counts.sum())
        norms = self._typical_norms()
        return {
            "x": _short(x),
            "y": _short(self._curve(x)),
            "density": _short(density),
            "norms": None if norms is None else _short(norms),
        }

    def power_shares(self) -> list[float] | None:
        """Return the share of each power in the output; None without coefficients.

            s_i = E (a_i p_i)^2 / sum_j E (a_j p_j)^2,   i = 0 .. r

        p_i is n(x^i), or h^i if the activation is not normalised, and p_0 = 1. Powers are not
        orthogonal: the sum in the denominator is not the mean square of the output.
        """
        if not len(self._squares):
            return None
        return (self._squares / self._squares.sum().clamp_min(1e-300)).tolist()

    def _typical_norms(self) -> Tensor | None:
        return torch.cat(self._norms).nanmedian(0).values if self._norms else None

    def _curve(self, x: Tensor) -> Tensor:
        return self._function.curve(x, self._typical_norms())


def _short(values: Tensor) -> list[float]:
    """Round to six digits, more than a figure shows."""
    return [float(f"{value:.6g}") for value in values.tolist()]
