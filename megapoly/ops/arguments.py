"""What the operators share: shapes, rows, and which coefficients a row uses."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megapoly.errors import ShapeError

ORDERS = (2, 3, 4)
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class RowArguments(NamedTuple):
    """Arguments of one call as rows.

    Args:
        x: [rows, d / tp].
        coefficients: [r + 1] or [experts, r + 1].
        probs: [rows] or None.
        gate: [rows, d / tp] or None.
        offsets: [experts + 1] int32 or None.
    """

    x: Tensor
    coefficients: Tensor
    probs: Tensor | None
    gate: Tensor | None
    offsets: Tensor | None


def as_rows(
    x: Tensor,
    coefficients: Tensor,
    offsets: Tensor | None,
    probs: Tensor | None,
    gate: Tensor | None,
) -> RowArguments:
    """Check that the arguments fit together and flatten the leading dimensions.

    Raises:
        ShapeError: they do not.
    """
    _check_tensors(x=x, coefficients=coefficients, offsets=offsets, probs=probs, gate=gate)
    _check_shapes(x, coefficients, offsets, probs, gate)
    rows = row_major(x.reshape(-1, x.shape[-1]))
    return RowArguments(
        rows,
        coefficients,
        None if probs is None else probs.reshape(-1),
        None if gate is None else row_major(gate.reshape(rows.shape)),
        None if offsets is None else offsets.to(torch.int32),
    )


def row_major(rows: Tensor) -> Tensor:
    """Rows whose elements lie side by side; the rows themselves may be apart (half of FC1)."""
    apart = rows.stride(0) < rows.shape[-1] and rows.shape[0] > 1
    return rows.contiguous() if apart or rows.stride(-1) != 1 else rows


def check_eps(eps: float) -> None:
    """Raise ValueError for an eps whose products with powers of m leave fp32."""
    if not 1e-30 <= eps <= 1e6:
        raise ValueError(f"`eps` is between 1e-30 and 1e6, got {eps}.")


def _check_tensors(**tensors: Tensor | None) -> None:
    """One device for all, floating dtypes that can be promoted; a gate as its rows."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    devices = {name: str(tensor.device) for name, tensor in given.items()}
    if len(set(devices.values())) > 1:
        raise ShapeError(f"All arguments are on one device, got {devices}.")
    for name, tensor in given.items():
        if name == "offsets":
            if tensor.dtype not in (torch.int32, torch.int64):
                raise ShapeError(f"`offsets` is int32, got {tensor.dtype}.")
        elif tensor.dtype not in _DTYPES:
            raise ShapeError(
                f"`{name}` is fp64, fp32, fp16 or bf16, got {tensor.dtype}; convert it."
            )
    x, gate = tensors["x"], tensors["gate"]
    if x is not None and gate is not None and x.dtype != gate.dtype:
        raise ShapeError(f"`gate` has the dtype of `x`, {x.dtype}, got {gate.dtype}.")


def _check_shapes(
    x: Tensor,
    coefficients: Tensor,
    offsets: Tensor | None,
    probs: Tensor | None,
    gate: Tensor | None,
) -> None:
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ShapeError(f"`x` needs a last dimension of at least 1, got {tuple(x.shape)}.")
    if (coefficients.dim() == 2) != (offsets is not None) or coefficients.dim() not in (1, 2):
        raise ShapeError(
            "`coefficients` is [order + 1] without `offsets` or [experts, order + 1] with them, "
            f"got {tuple(coefficients.shape)} and {'no ' if offsets is None else ''}offsets."
        )
    if coefficients.shape[-1] - 1 not in ORDERS:
        raise ShapeError(
            f"`coefficients` has order + 1 entries a set, order in {ORDERS}, got "
            f"{tuple(coefficients.shape)}."
        )
    if offsets is not None and offsets.shape != (coefficients.shape[0] + 1,):
        raise ShapeError(
            f"`offsets` has one more entry than there are experts ({coefficients.shape[0]}), got "
            f"{tuple(offsets.shape)}."
        )
    if offsets is not None and x.dim() != 2:
        raise ShapeError(f"`x` is [rows, width] with `offsets`, got {tuple(x.shape)}.")
    if probs is not None and probs.shape != x.shape[:-1]:
        raise ShapeError(f"`probs` is {tuple(x.shape[:-1])}, one a row, got {tuple(probs.shape)}.")
    if gate is not None and gate.shape != x.shape:
        raise ShapeError(f"`gate` has the shape of `x`, {tuple(x.shape)}, got {tuple(gate.shape)}.")


def expert_of_row(offsets: Tensor, num_rows: int) -> Tensor:
    """Expert of each row, for rows sorted by expert: expert e owns offsets[e] to offsets[e + 1].

    Args:
        offsets: [experts + 1] integers, ascending from 0.
        num_rows: rows.

    Returns:
        [num_rows] int32; rows from offsets[experts] on are padding and get the number of experts.
    """
    rows = torch.arange(num_rows, device=offsets.device, dtype=offsets.dtype)
    return torch.searchsorted(offsets[1:], rows, right=True, out_int32=True)


def of_each_row(parameter: Tensor, expert: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[n] -> [1, n], or [experts, n] -> [rows, n] with zeros for padding rows."""
    parameter = parameter.to(dtype)
    if expert is None:
        return parameter[None]
    return torch.cat([parameter, parameter.new_zeros(1, parameter.shape[-1])])[expert]


def sum_over_rows(per_row: Tensor, expert: Tensor | None, num_experts: int) -> Tensor:
    """[rows, n] -> [n], or [experts, n] with the sum of each expert's rows; added up in fp64."""
    per_row = per_row.double()
    if expert is None:
        return per_row.sum(0)
    sums = per_row.new_zeros(num_experts + 1, per_row.shape[-1])
    return sums.index_add(0, expert, per_row)[:num_experts]
