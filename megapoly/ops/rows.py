"""What the operators share: shapes, and which coefficients a row uses."""

from __future__ import annotations

import torch
from torch import Tensor

from megapoly.errors import ShapeError


def check_shapes(
    x: Tensor,
    coefficients: Tensor,
    offsets: Tensor | None,
    probs: Tensor | None,
    gate: Tensor | None,
) -> None:
    """Raise :class:`ShapeError` for arguments that do not fit together."""
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ShapeError(f"`x` needs a last dimension of at least 1, got {tuple(x.shape)}.")
    if (coefficients.dim() == 2) != (offsets is not None) or coefficients.dim() not in (1, 2):
        raise ShapeError(
            "`coefficients` is [order + 1] without `offsets` or [experts, order + 1] with them, "
            f"got {tuple(coefficients.shape)} and {'no ' if offsets is None else ''}offsets."
        )
    if offsets is not None and offsets.shape != (coefficients.shape[0] + 1,):
        raise ShapeError(
            f"`offsets` has one more entry than there are experts ({coefficients.shape[0]}), got "
            f"{tuple(offsets.shape)}."
        )
    if probs is not None and probs.shape != x.shape[:-1]:
        raise ShapeError(f"`probs` is {tuple(x.shape[:-1])}, one a row, got {tuple(probs.shape)}.")
    if gate is not None and gate.shape != x.shape:
        raise ShapeError(f"`gate` has the shape of `x`, {tuple(x.shape)}, got {tuple(gate.shape)}.")


def expert_of_row(offsets: Tensor, num_rows: int) -> Tensor:
    """Expert of each row, for rows sorted by expert: expert e owns offsets[e] to offsets[e + 1].

    Args:
        offsets: [experts + 1] integers, ascending from 0 to the number of rows.
        num_rows: rows.

    Returns:
        [num_rows] int64.
    """
    rows = torch.arange(num_rows, device=offsets.device, dtype=offsets.dtype)
    return torch.searchsorted(offsets[1:], rows, right=True)
