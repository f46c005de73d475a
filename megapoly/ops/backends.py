"""How the operators' row functions run: as written, or compiled."""

from __future__ import annotations

import functools
import logging
import os
import shutil
import sys
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from megapoly.errors import UnavailableError

Backend = Literal["auto", "reference", "compiled"]

logger = logging.getLogger(__name__)


def compiler_missing(device_type: str) -> str | None:
    """Why ``compiled`` cannot run on a device, or None if it can."""
    if device_type == "cuda":
        try:
            import triton  # noqa: F401
        except ImportError:
            return "Triton is not installed (`pip install triton`)"
        return None
    # The one that torch._inductor.config.cpp.cxx takes; it does not look for others.
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if not shutil.which(compiler):
        return f"there is no C++ compiler {compiler} on PATH (Debian: `apt-get install g++`)"
    return None


@functools.cache
def resolve_backend(backend: Backend, device_type: str) -> Literal["reference", "compiled"]:
    """The backend that runs; ``auto`` takes ``compiled`` where it can and says once which.

    Raises:
        UnavailableError: ``compiled`` was asked for and there is no compiler.
    """
    if backend == "reference":
        return "reference"
    missing = compiler_missing(device_type)
    if backend == "compiled" and missing:
        raise UnavailableError(
            f"The `compiled` activation backend cannot run on {device_type}: {missing}; or use "
            "`--model.activation_backend reference`."
        )
    if backend == "auto":
        reason = f": {missing}" if missing else ""
        logger.info("activation backend: %s%s", "reference" if missing else "compiled", reason)
    return "reference" if missing else "compiled"


def row_function(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Make a function of rows run on either backend, by the keyword ``backend``.

    Compiled with dynamic shapes, so that the number of rows is not part of the code: one
    compilation serves every number of tokens. Inductor specialises on 0 and 1, so these few rows
    run as written.
    """
    compiled = torch.compile(function, dynamic=True, fullgraph=True)

    @functools.wraps(function)
    def run(x: Tensor, *args: Tensor | None, backend: Backend) -> Tensor:
        if x.shape[0] > 1 and resolve_backend(backend, x.device.type) == "compiled":
            return compiled(x, *args)
        return function(x, *args)

    return run
