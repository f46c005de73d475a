"""The functions that a backend provides for PolyReLU's rows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from megapoly.ops import polyrelu_reference
from megapoly.ops.backends import Backend, compiled, resolve_backend


class PolyReLURows(NamedTuple):
    """One backend; the functions are those of :mod:`megapoly.ops.polyrelu_reference`."""

    forward: Callable[..., Tensor]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]]


def rows_of(backend: Backend, x: Tensor) -> PolyReLURows:
    """The functions for the device and dtype of ``x``."""
    return _rows_of(resolve_backend(backend, x.device.type, x.dtype))


@functools.cache
def _rows_of(backend: str) -> PolyReLURows:
    if backend == "reference":
        return PolyReLURows(polyrelu_reference.forward, polyrelu_reference.backward)
    if backend == "compiled":
        return PolyReLURows(
            compiled(polyrelu_reference.forward), compiled(polyrelu_reference.backward)
        )
    from megapoly.ops.triton import polyrelu_launch as kernels

    return PolyReLURows(kernels.forward, kernels.backward)
