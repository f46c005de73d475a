"""Launch of PolyNorm's kernels: the functions of :mod:`megapoly.ops.polynorm_reference`."""

from __future__ import annotations

import torch
from torch import Tensor

from megapoly.ops.triton.host import (
    alignment,
    blocked_row_options,
    contiguous,
    experts_of,
    gradient_of_sets,
    on_device_of_rows,
    row_stride,
    whole_row_options,
)
from megapoly.ops.triton.kernels import polynorm_split_row, polynorm_whole_row
from megapoly.ops.triton.tile_sizes import whole_row_tiles

_RSQRT_ROWS = 128


@on_device_of_rows
def forward(
    x: Tensor,
    coefficients: Tensor,
    probs: Tensor | None,
    gate: Tensor | None,
    offsets: Tensor | None,
    divisor: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Compute output and reciprocal roots of rows that are not split over ranks."""
    num_rows, width = x.shape
    order = coefficients.shape[-1] - 1
    tiles = whole_row_tiles(width, num_values=1, order=order)
    if tiles is None:
        rsqrt = rsqrt_of_square_sums(square_sums(x, order), divisor, eps, torch.float32)
        return evaluate(x, rsqrt, coefficients, probs, gate, offsets), rsqrt
    y = x.new_empty(x.shape)
    rsqrt = x.new_empty(num_rows, order, dtype=torch.float32)
    if num_rows:
        polynorm_whole_row.forward_kernel[(num_rows,)](
            x,
            gate,
            coefficients.contiguous(),
            contiguous(probs),
            experts_of(offsets, num_rows),
            y,
            rsqrt,
            x.stride(0),
            row_stride(gate),
            width,
            coefficients.shape[0],
            1.0 / divisor,
            eps,
            ORDER=order,
            ALIGN=alignment(width, x.stride(0), row_stride(gate)),
            HAS_GATE=gate is not None,
            HAS_PROBS=probs is not None,
            HAS_EXPERTS=offsets is not None,
            **whole_row_options(tiles),
        )
    return y, rsqrt


@on_device_of_rows
def backward(
    x: Tensor,
    rsqrt: Tensor,
    grad_output: Tensor,
    coefficients: Tensor,
    probs: Tensor | None,
    gate: Tensor | None,
    offsets: Tensor | None,
    divisor: int,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Compute gradients of x, coefficients, probs and gate of rows that are not split."""
    num_rows, width = x.shape
    order = rsqrt.shape[-1]
    # The kernel keeps x and the gradient, and the gate.
    tiles = whole_row_tiles(width, num_values=2 if gate is None else 3, order=order)
    if tiles is None:
        sums = gradient_sums(x, rsqrt, grad_output, gate)
        grads = gradients(x, rsqrt, sums, grad_output, coefficients, probs, gate, offsets, divisor)
        grad_gate = None
        if gate is not None:
            grad_gate = evaluate(x, rsqrt, coefficients, probs, grad_output, offsets)
        return *grads, grad_gate
    grad_x = x.new_empty(x.shape)
    grad_gate = None if gate is None else gate.new_empty(gate.shape)
    grad_probs = None if probs is None else probs.new_empty(probs.shape)
    terms = rsqrt.new_empty(num_rows, order + 1)
    if num_rows:
        polynorm_whole_row.backward_kernel[(num_rows,)](
            grad_output,
            x,
            rsqrt,
            gate,
            coefficients.contiguous(),
            contiguous(probs),
            experts_of(offsets, num_rows),
            grad_x,
            grad_gate,
            grad_probs,
            terms,
            grad_output.stride(0),
            x.stride(0),
            row_stride(gate),
            width,
            coefficients.shape[0],
            1.0 / divisor,
            ORDER=order,
            ALIGN=alignment(width, grad_output.stride(0), x.stride(0), row_stride(gate)),
            HAS_GATE=gate is not None,
            HAS_PROBS=probs is not None,
            HAS_EXPERTS=offsets is not None,
            **whole_row_options(tiles),
        )
    return grad_x, gradient_of_sets(terms, coefficients, offsets), grad_probs, grad_gate


@on_device_of_rows
def square_sums(x: Tensor, order: int) -> Tensor:
    """Sum (x_j 2^-8)^2k over a part of each row: [rows, order] fp64."""
    num_rows, width = x.shape
    result = x.new_empty(num_rows, order, dtype=torch.float64)
    if num_rows:
        polynorm_split_row.square_sums_kernel[(num_rows,)](
            x,
            result,
            x.stride(0),
            width,
            ORDER=order,
            ALIGN=alignment(width, x.stride(0)),
            **blocked_row_options(width),
        )
    return result


@on_device_of_rows
def rsqrt_of_square_sums(
    square_sums: Tensor, divisor: int, eps: float, dtype: torch.dtype
) -> Tensor:
    """Compute the reciprocal roots of each row, [r_1 2^16, t_2, ..] in fp32."""
    num_rows, order = square_sums.shape
    result = square_sums.new_empty(num_rows, order, dtype=dtype)
    if num_rows:
        polynorm_split_row.rsqrt_kernel[(-(-num_rows // _RSQRT_ROWS),)](
            square_sums.contiguous(),
            result,
            num_rows,
            divisor,
            eps,
            ORDER=order,
            BLOCK=_RSQRT_ROWS,
            num_warps=4,
        )
    return result


@on_device_of_rows
def evaluate(
    x: Tensor,
    rsqrt: Tensor,
    coefficients: Tensor,
    probs: Tensor | None,
    factor: Tensor | None,
    offsets: Tensor | None,
) -> Tensor:
    """Compute p (a_0 + a_1 n(x) + ..) factor in the dtype of ``x``."""
    num_rows, width = x.shape
    y = x.new_empty(x.shape)
    if num_rows:
        polynorm_split_row.evaluate_kernel[(num_rows,)](
            x,
            rsqrt,
            factor,
            coefficients.contiguous(),
            contiguous(probs),
            experts_of(offsets, num_rows),
            y,
            x.stride(0),
            row_stride(factor),
            width,
            coefficients.shape[0],
            ORDER=rsqrt.shape[-1],
            ALIGN=alignment(width, x.stride(0), row_stride(factor)),
            HAS_FACTOR=factor is not None,
            HAS_PROBS=probs is not None,
            HAS_EXPERTS=offsets is not None,
            **blocked_row_options(width),
        )
    return y


@on_device_of_rows
def gradient_sums(x: Tensor, rsqrt: Tensor, grad_output: Tensor, gate: Tensor | None) -> Tensor:
    """Sum g_j u_j z_j^k over a part of each row: [rows, order + 1]."""
    num_rows, width = x.shape
    order = rsqrt.shape[-1]
    sums = rsqrt.new_empty(num_rows, order + 1)
    if num_rows:
        polynorm_split_row.gradient_sums_kernel[(num_rows,)](
            x,
            rsqrt,
            grad_output,
            gate,
            sums,
            x.stride(0),
            grad_output.stride(0),
            row_stride(gate),
            width,
            ORDER=order,
            ALIGN=alignment(width, x.stride(0), grad_output.stride(0), row_stride(gate)),
            HAS_GATE=gate is not None,
            **blocked_row_options(width),
        )
    return sums


@on_device_of_rows
def gradients(
    x: Tensor,
    rsqrt: Tensor,
    sums: Tensor,
    grad_output: Tensor,
    coefficients: Tensor,
    probs: Tensor | None,
    gate: Tensor | None,
    offsets: Tensor | None,
    divisor: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Compute gradients of x, coefficients and probs from the gradient sums of whole rows."""
    num_rows, width = x.shape
    order = rsqrt.shape[-1]
    grad_x = x.new_empty(x.shape)
    grad_probs = None if probs is None else probs.new_empty(probs.shape)
    terms = rsqrt.new_empty(num_rows, order + 1)
    if num_rows:
        polynorm_split_row.gradients_kernel[(num_rows,)](
            x,
            rsqrt,
            sums.contiguous(),
            grad_output,
            gate,
            coefficients.contiguous(),
            contiguous(probs),
            experts_of(offsets, num_rows),
            grad_x,
            grad_probs,
            terms,
            x.stride(0),
            grad_output.stride(0),
            row_stride(gate),
            width,
            coefficients.shape[0],
            1.0 / divisor,
            ORDER=order,
            ALIGN=alignment(width, x.stride(0), grad_output.stride(0), row_stride(gate)),
            HAS_GATE=gate is not None,
            HAS_PROBS=probs is not None,
            HAS_EXPERTS=offsets is not None,
            **blocked_row_options(width),
        )
    return grad_x, gradient_of_sets(terms, coefficients, offsets), grad_probs
