"""Launch of PolyReLU's kernels: the functions of :mod:`megapoly.ops.polyrelu_reference`."""

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
)
from megapoly.ops.triton.kernels import polyrelu_row as kernels


@on_device_of_rows
def forward(
    x: Tensor,
    coefficients: Tensor,
    slope: Tensor | None,
    probs: Tensor | None,
    gate: Tensor | None,
    offsets: Tensor | None,
) -> Tensor:
    """Compute p (a_0 + a_1 h + .. + a_r h^r) u in the dtype of ``x``; 0 in padding rows."""
    num_rows, width = x.shape
    y = x.new_empty(x.shape)
    if num_rows:
        kernels.forward_kernel[(num_rows,)](
            x,
            gate,
            coefficients.contiguous(),
            contiguous(slope),
            contiguous(probs),
            experts_of(offsets, num_rows),
            y,
            x.stride(0),
            row_stride(gate),
            width,
            coefficients.shape[0],
            ORDER=coefficients.shape[-1] - 1,
            ALIGN=alignment(width, x.stride(0), row_stride(gate)),
            HAS_GATE=gate is not None,
            HAS_SLOPE=slope is not None,
            HAS_PROBS=probs is not None,
            HAS_EXPERTS=offsets is not None,
            **blocked_row_options(width),
        )
    return y


@on_device_of_rows
def backward(
    x: Tensor,
    grad_output: Tensor,
    coefficients: Tensor,
    slope: Tensor | None,
    probs: Tensor | None,
    gate: Tensor | None,
    offsets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Compute gradients of x, coefficients, slope, probs and gate; partial sums of partial rows."""
    num_rows, width = x.shape
    order = coefficients.shape[-1] - 1
    grad_x = x.new_empty(x.shape)
    grad_gate = None if gate is None else gate.new_empty(gate.shape)
    grad_probs = None if probs is None else probs.new_empty(probs.shape, dtype=torch.float32)
    terms = x.new_empty(num_rows, order + 1, dtype=torch.float32)
    slope_terms = None if slope is None else terms.new_empty(num_rows, 1)
    if num_rows:
        kernels.backward_kernel[(num_rows,)](
            grad_output,
            x,
            gate,
            coefficients.contiguous(),
            contiguous(slope),
            contiguous(probs),
            experts_of(offsets, num_rows),
            grad_x,
            grad_gate,
            grad_probs,
            terms,
            slope_terms,
            grad_output.stride(0),
            x.stride(0),
            row_stride(gate),
            width,
            coefficients.shape[0],
            ORDER=order,
            ALIGN=alignment(width, grad_output.stride(0), x.stride(0), row_stride(gate)),
            HAS_GATE=gate is not None,
            HAS_SLOPE=slope is not None,
            HAS_PROBS=probs is not None,
            HAS_EXPERTS=offsets is not None,
            **blocked_row_options(width),
        )
    grad_coefficients = gradient_of_sets(terms, coefficients, offsets)
    grad_slope = None
    if slope is not None and slope_terms is not None:
        grad_slope = gradient_of_sets(slope_terms, slope, offsets)
    return grad_x, grad_coefficients, grad_slope, grad_probs, grad_gate
