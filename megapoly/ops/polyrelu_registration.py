"""PolyReLU's operators in ``torch.ops.megapoly``: forward and backward."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megapoly.ops import polyrelu_reference
from megapoly.ops.arguments import row_major
from megapoly.ops.backends import load_functions, resolve_backend
from megapoly.ops.collectives import PendingSum, check_segments, segments, size_of
from megapoly.ops.library import (
    absent,
    differentiate,
    operator,
    or_absent,
    present,
    refuse_derivative,
)
from megapoly.polynomial import Backend

_ROWS = "Tensor coefficients, Tensor? slope, Tensor? probs, Tensor? gate, Tensor? offsets"
_LAYOUT = "str group, bool deterministic, str backend"
_NUM_LAYOUT = 3


@dataclass(frozen=True)
class PolyReLUFunctions:
    """One backend; each function is the one of that name in :mod:`.polyrelu_reference`."""

    forward: Callable[..., Tensor]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]]


def functions_for(backend: Backend, x: Tensor) -> PolyReLUFunctions:
    """Return the functions that run on the device and dtype of ``x``."""
    return _functions(resolve_backend(backend, x.device.type, x.dtype))


@functools.cache
def _functions(backend: str) -> PolyReLUFunctions:
    kernels = "megapoly.ops.triton.polyrelu_launch"
    return load_functions(PolyReLUFunctions, backend, polyrelu_reference, kernels)


def _fake_forward(x: Tensor, *others: Any) -> Tensor:
    return x.new_empty(x.shape)


@operator(f"polyrelu_forward(Tensor x, {_ROWS}, {_LAYOUT}) -> Tensor", fake=_fake_forward)
def polyrelu_forward(
    x: Tensor,
    coefficients: Tensor,
    slope: Tensor | None,
    probs: Tensor | None,
    gate: Tensor | None,
    offsets: Tensor | None,
    group: str,
    deterministic: bool,
    backend: Backend,
) -> Tensor:
    """Compute the output, pointwise; the backward pass uses the layout."""
    return functions_for(backend, x).forward(x, coefficients, slope, probs, gate, offsets)


def _fake_backward(
    grad_output: Tensor,
    x: Tensor,
    coefficients: Tensor,
    slope: Tensor | None,
    probs: Tensor | None,
    gate: Tensor | None,
    *others: Any,
) -> tuple[Tensor, ...]:
    optional = (
        absent(x) if tensor is None else tensor.new_empty(tensor.shape)
        for tensor in (slope, probs, gate)
    )
    return x.new_empty(x.shape), torch.empty_like(coefficients), *optional


@operator(
    f"polyrelu_backward(Tensor grad_output, Tensor x, {_ROWS}, {_LAYOUT})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_backward,
)
def polyrelu_backward(
    grad_output: Tensor,
    x: Tensor,
    coefficients: Tensor,
    slope: Tensor | None,
    probs: Tensor | None,
    gate: Tensor | None,
    offsets: Tensor | None,
    group: str,
    deterministic: bool,
    backend: Backend,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute gradients of x, coefficients, slope, probs and gate.

    Gradients of coefficients, slope and probs are sums over the row and share one all-reduce.
    """
    num_ranks = size_of(group)
    if deterministic:
        check_segments(x.shape[-1], num_ranks)
    num_segments = len(segments(x, num_ranks)) if deterministic else 1
    grads_x, grads_gate = list[Tensor](), list[Tensor]()
    partial_sums = list[Tensor]()
    for x_part, grad_part, gate_part in zip(
        x.chunk(num_segments, -1),
        row_major(grad_output).chunk(num_segments, -1),
        [None] * num_segments if gate is None else gate.chunk(num_segments, -1),
        strict=True,
    ):
        grad_x, *row_sums, grad_gate = functions_for(backend, x).backward(
            x_part, grad_part, coefficients, slope, probs, gate_part, offsets
        )
        grads_x.append(grad_x)
        if grad_gate is not None:
            grads_gate.append(grad_gate)
        partial_sums.append(
            torch.cat([sums.double().flatten() for sums in row_sums if sums is not None])
        )
    sums = torch.stack(partial_sums) if deterministic else partial_sums[0]
    sums = PendingSum(sums, group, deterministic=deterministic).wait()
    return (
        _concatenate(grads_x),
        *_split_sums(sums, coefficients, slope, probs, x),
        absent(x) if gate is None else _concatenate(grads_gate),
    )


def _concatenate(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _split_sums(
    sums: Tensor, coefficients: Tensor, slope: Tensor | None, probs: Tensor | None, x: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Split the flat sums into gradients of coefficients, slope and probs."""
    likes = [tensor for tensor in (coefficients, slope, probs) if tensor is not None]
    parts = iter(sums.split([tensor.numel() for tensor in likes]))
    grads = [
        None if like is None else next(parts).view(like.shape).to(like.dtype, copy=True)
        for like in (coefficients, slope, probs)
    ]
    grad_coefficients, grad_slope, grad_probs = (or_absent(grad, x) for grad in grads)
    return grad_coefficients, grad_slope, grad_probs


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:-_NUM_LAYOUT])
    ctx.layout = inputs[-_NUM_LAYOUT:]


def _gradients(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    grad_x, grad_coefficients, *others = polyrelu_backward(
        grad_output, *ctx.saved_tensors, *ctx.layout
    )
    return (
        grad_x,
        grad_coefficients,
        *(present(grad) for grad in others),
        *(None,) * (1 + _NUM_LAYOUT),
    )


refuse_derivative(polyrelu_backward)
differentiate(polyrelu_forward, save=_save, backward=_gradients)
