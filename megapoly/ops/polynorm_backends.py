"""The functions that a backend provides for PolyNorm's rows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from megapoly.ops import polynorm_reference
from megapoly.ops.backends import Backend, compiled, resolve_backend


@dataclass(frozen=True)
class PolyNormRows:
    """One backend; each function is the one of that name in :mod:`.polynorm_reference`.

    Args:
        forward: of rows that one rank holds whole.
        backward: the same.
        moments: a part of each row to its sums of squares, which ranks add up.
        rsqrt_of_moments: these to reciprocal roots.
        evaluate: the polynomial, pointwise.
        gradient_sums: a part of each row to its gradient sums, which ranks add up.
        gradients: these to gradients, pointwise.
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor | None, Tensor | None]]
    moments: Callable[[Tensor, int], Tensor]
    rsqrt_of_moments: Callable[[Tensor, int, float, torch.dtype], Tensor]
    evaluate: Callable[..., Tensor]
    gradient_sums: Callable[..., Tensor]
    gradients: Callable[..., tuple[Tensor, Tensor, Tensor | None]]


_NAMES = [field.name for field in fields(PolyNormRows)]
_REFERENCE = PolyNormRows(**{name: getattr(polynorm_reference, name) for name in _NAMES})


def rows_of(backend: Backend, x: Tensor) -> PolyNormRows:
    """The functions for the device and dtype of ``x``."""
    return _rows_of(resolve_backend(backend, x.device.type, x.dtype))


@functools.cache
def _rows_of(backend: str) -> PolyNormRows:
    if backend == "reference":
        return _REFERENCE
    if backend == "compiled":
        return PolyNormRows(
            **{name: compiled(getattr(polynorm_reference, name)) for name in _NAMES}
        )
    from megapoly.ops.triton import polynorm_launch as kernels

    return PolyNormRows(**{name: getattr(kernels, name) for name in _NAMES})
