"""PolyReLU: a polynomial of the rectified input."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megapoly.errors import ShapeError
from megapoly.ops.collectives import sum_gradients
from megapoly.ops.rows import check_shapes, expert_of_row


def polyrelu(
    x: Tensor,
    coefficients: Tensor,
    *,
    slope: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    offsets: Tensor | None = None,
    probs: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """Polynomial of ``relu(x)``, or of ``prelu(x)`` when a slope is given.

        y = p (a0 + a1 h + a2 h^2 + .. + ar h^r) u,   h = max(x, 0) + slope min(x, 0)

    Source: PolyCom (ICLR 2025), Eq. 2; PolyPReLU is of Fig. 5(b).

    Args:
        x: [..., d / tp]; any floating dtype.
        coefficients: [r + 1], ascending powers, or [experts, r + 1] with ``offsets``.
        slope: [1], or [experts, 1] with ``offsets``: the learned slope below zero.
        group: ranks that share one row; gradients of ``coefficients``, ``slope`` and ``probs`` are
            summed over it and complete on every rank.
        offsets: [experts + 1] integers for rows sorted by expert; ``x`` is then [rows, d / tp].
        probs: p, one a row (the router probability).
        gate: u, the shape of ``x`` (the gated form).

    Returns:
        [..., d / tp] in the dtype of ``x``; computed in fp32 or better.

    Raises:
        ShapeError: the arguments do not fit together.
    """
    check_shapes(x, coefficients, offsets, probs, gate)
    one_per_set = (*coefficients.shape[:-1], 1)
    if slope is not None and slope.shape != one_per_set:
        raise ShapeError(
            f"`slope` is {one_per_set}, one for each coefficient set, got {tuple(slope.shape)}."
        )
    compute_dtype = torch.promote_types(x.dtype, torch.float32)
    per_row = coefficients if offsets is None else expert_of_row(offsets, x.shape[0])

    def of_rows(parameter: Tensor) -> Tensor:
        parameter = sum_gradients(parameter.to(compute_dtype), group)
        return parameter if offsets is None else parameter[per_row]

    a = of_rows(coefficients).unsqueeze(-2) if offsets is None else of_rows(coefficients)[:, None]
    values = x.to(compute_dtype)
    h = values.relu()
    if slope is not None:
        h = h - of_rows(slope) * (-values).relu()
    y = a[..., -1]
    for k in range(coefficients.shape[-1] - 2, -1, -1):
        y = torch.addcmul(a[..., k], y, h) if y.shape == h.shape else a[..., k] + y * h
    if probs is not None:
        y = y * sum_gradients(probs.to(compute_dtype), group).unsqueeze(-1)
    if gate is not None:
        y = y * gate.to(compute_dtype)
    return y.to(x.dtype)
