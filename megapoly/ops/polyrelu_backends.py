"""The functions that a backend provides for PolyReLU's rows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from megapoly.ops import polyrelu_rows
from megapoly.ops.backends import Backend, compiled, resolve_backend


class PolyReLURows(NamedTuple):
    """One backend; the functions are those of :mod:`megapoly.ops.polyrelu_rows`."""

    forward: Callable[..., Tensor]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]]


def rows_of(backend: Backend, x: Tensor) -> PolyReLURows:
    """The functions for the device and dtype of ``x``."""
    return _rows_of(resolve_backend(backend, x.device.type, x.dtype))


@functools.cache
def _rows_of(backend: str) -> PolyReLURows:
    if backend == "reference":
        return PolyReLURows(polyrelu_rows.forward, polyrelu_rows.backward)
    if backend == "compiled":
        return PolyReLURows(compiled(polyrelu_rows.forward), compiled(polyrelu_rows.backward))
    from megapoly.ops.triton import polyrelu as kernels

    return PolyReLURows(kernels.forward, kernels.backward)
