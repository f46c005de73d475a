"""PolyReLU: a polynomial of the rectified input."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from megapoly.errors import ShapeError
from megapoly.ops.arguments import as_rows
from megapoly.ops.collectives import name_of
from megapoly.ops.polyrelu_registration import polyrelu_forward
from megapoly.polynomial import Backend


def polyrelu(
    x: Tensor,
    coefficients: Tensor,
    *,
    slope: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    offsets: Tensor | None = None,
    probs: Tensor | None = None,
    gate: Tensor | None = None,
    deterministic: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """Compute a polynomial of ``relu(x)``, or of ``prelu(x)`` if a slope is given.

        y = p (a0 + a1 h + a2 h^2 + .. + ar h^r) u,   h = max(x, 0) + slope min(x, 0)

    Source: PolyCom (ICLR 2025), Eq. 2; PolyPReLU: Fig. 5(b).

    Args:
        x: [..., d / tp]; any floating dtype. Powers are not normalised: |h|^r and its products with
            gradients must be finite in fp32.
        coefficients: [r + 1], ascending powers, or [experts, r + 1] with ``offsets``; r is 2 to 4.
        slope: [1], or [experts, 1] with ``offsets``: the learned slope below zero.
        group: ranks that share one row; gradients of ``coefficients``, ``slope`` and ``probs`` are
            summed over it, by one all-reduce backward, and are complete on every rank.
        offsets: [experts + 1] int32 for rows sorted by expert, ascending from 0 to at most the
            number of rows, see :func:`megapoly.ops.expert_offsets`; ``x`` is then [rows, d / tp].
            It stays on the device. Rows from offsets[experts] on are padding: output and gradients
            are 0 there, whatever ``x`` holds.
        probs: p, one per row (the router probability).
        gate: u, of the shape of ``x`` (the gated form).
        deterministic: give the same bits on 1, 2, 4 and 8 ranks, see :func:`megapoly.ops.polynorm`.
        backend: as in :func:`megapoly.ops.polynorm`.

    Returns:
        [..., d / tp] in the dtype of ``x``; computed in fp32 (fp64 for fp64). Only ``x`` is saved
        for the backward pass.

    Raises:
        ShapeError: the arguments do not fit together.
        ValueError: ``backend`` is not valid.
        UnavailableError: the backend cannot run on this machine.
        NotImplementedError: forward-mode or second derivatives are requested.
    """
    rows = as_rows(x, coefficients, offsets, probs, gate)
    one_per_set = (*coefficients.shape[:-1], 1)
    if slope is not None and slope.shape != one_per_set:
        raise ShapeError(
            f"`slope` must be {one_per_set}, one per coefficient set, got {tuple(slope.shape)}."
        )
    y: Tensor = polyrelu_forward(
        rows.x,
        rows.coefficients,
        slope,
        rows.probs,
        rows.gate,
        rows.offsets,
        name_of(group),
        deterministic,
        backend,
    )
    return y.view(x.shape)
