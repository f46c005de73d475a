"""Arguments of the operators: checks, rows, and the coefficients that a row uses."""

from __future__ import annotations

from typing import NamedTuple, get_args

import torch
from torch import Tensor

from megapoly.errors import ShapeError
from megapoly.polynomial import ORDERS, Norm

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class RowArguments(NamedTuple):
    """Tensors of one call, flattened to rows.

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
        ShapeError: the arguments do not fit together.
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
    """Make the elements of a row contiguous; rows may be apart, as in half of FC1's output."""
    apart = rows.stride(0) < rows.shape[-1] and rows.shape[0] > 1
    return rows.contiguous() if apart or rows.stride(-1) != 1 else rows


def check_eps(eps: float) -> None:
    """Raise ValueError for an eps whose products with powers of m leave fp32."""
    if not 1e-30 <= eps <= 1e6:
        raise ValueError(f"`eps` ({eps}) must be between 1e-30 and 1e6; 1e-6 is the default.")


def check_order(order: int) -> None:
    """Raise ValueError for an order that the operators do not support."""
    if order not in ORDERS:
        raise ValueError(f"`order` ({order}) is not valid; must be one of {ORDERS}.")


def check_norm(norm: str) -> None:
    """Raise ValueError for an unknown norm."""
    if norm not in get_args(Norm):
        raise ValueError(f"`norm` ({norm}) is not valid; must be rms or l2.")


def _check_tensors(**tensors: Tensor | None) -> None:
    """Check kinds, devices and dtypes."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    for name, tensor in given.items():
        if placements := getattr(tensor, "placements", None):
            raise ShapeError(
                f"`{name}` must be a local tensor, got a DTensor with placements "
                f"{placements}; pass `{name}.to_local()`, and where ranks hold parts of a "
                "row, their process group as `group` (`device_mesh.get_group(..)`)."
            )
    devices = {name: str(tensor.device) for name, tensor in given.items()}
    if len(set(devices.values())) > 1:
        raise ShapeError(f"All arguments must be on one device, got {devices}; move them.")
    for name, tensor in given.items():
        if name == "offsets":
            if tensor.dtype not in (torch.int32, torch.int64):
                raise ShapeError(f"`offsets` must be int32, got {tensor.dtype}; convert it.")
        elif tensor.dtype not in _DTYPES:
            raise ShapeError(
                f"`{name}` must be fp64, fp32, fp16 or bf16, got {tensor.dtype}; convert it."
            )
    x, gate = tensors["x"], tensors["gate"]
    if x is not None and gate is not None and x.dtype != gate.dtype:
        raise ShapeError(
            f"`gate` must have the dtype of `x`, {x.dtype}, got {gate.dtype}; convert it."
        )


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
            "`coefficients` must be [order + 1] without `offsets`, or [experts, order + 1] with "
            f"them, got {tuple(coefficients.shape)} and {'no ' if offsets is None else ''}offsets."
        )
    if coefficients.shape[-1] - 1 not in ORDERS:
        raise ShapeError(
            f"`coefficients` must have order + 1 entries per set, with order in {ORDERS}, got "
            f"{tuple(coefficients.shape)}."
        )
    if offsets is not None and offsets.shape != (coefficients.shape[0] + 1,):
        raise ShapeError(
            f"`offsets` must have one more entry than experts ({coefficients.shape[0]}), got "
            f"{tuple(offsets.shape)}."
        )
    if offsets is not None and x.dim() != 2:
        raise ShapeError(
            f"`x` must be [rows, width] with `offsets`, got {tuple(x.shape)}; flatten it."
        )
    if probs is not None and probs.shape != x.shape[:-1]:
        raise ShapeError(
            f"`probs` must be {tuple(x.shape[:-1])}, one per row, got {tuple(probs.shape)}."
        )
    if gate is not None and gate.shape != x.shape:
        raise ShapeError(
            f"`gate` must have the shape of `x`, {tuple(x.shape)}, got {tuple(gate.shape)}."
        )


def expert_offsets(tokens_per_expert: Tensor, device: torch.device | None = None) -> Tensor:
    """Return the first row of each expert and then the number of rows, for rows sorted by expert.

    Args:
        tokens_per_expert: [experts] integers, rows of each expert.
        device: of the result; None: the device of ``tokens_per_expert``.

    Returns:
        [experts + 1] int32: the ``offsets`` of the operators.
    """
    counts = tokens_per_expert.to(device=device, dtype=torch.int32)
    return torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))


def expert_of_row(offsets: Tensor, num_rows: int) -> Tensor:
    """Return the expert of each row, for rows sorted by expert.

    Expert e has rows offsets[e] to offsets[e + 1] - 1.

    Args:
        offsets: [experts + 1] integers, ascending from 0.
        num_rows: rows.

    Returns:
        [num_rows] int32; padding, the rows from offsets[experts] on, gets the number of experts.
    """
    rows = torch.arange(num_rows, device=offsets.device, dtype=offsets.dtype)
    return torch.searchsorted(offsets[1:], rows, right=True, out_int32=True)


def expand_to_rows(parameter: Tensor, expert: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Expand [n] to [1, n], or [experts, n] to [rows, n] with zeros for padding rows."""
    parameter = parameter.to(dtype)
    if expert is None:
        return parameter[None]
    return torch.cat([parameter, parameter.new_zeros(1, parameter.shape[-1])])[expert]


def sum_over_rows(terms: Tensor, expert: Tensor | None, num_experts: int) -> Tensor:
    """Sum [rows, n] to [n], or the rows of each expert to [experts, n], in fp64."""
    terms = terms.double()
    if expert is None:
        return terms.sum(0)
    sums = terms.new_zeros(num_experts + 1, terms.shape[-1])
    return sums.index_add(0, expert, terms)[:num_experts]
