"""Backends: plain PyTorch, PyTorch compiled, or Triton kernels."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import fields
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar, get_args

import torch

from megapoly.errors import UnavailableError
from megapoly.polynomial import Backend

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# There are more combinations of order, dtype and optional arguments than the default limit of 8
# recompilations. Constants and eps are literals: read from memory they cost a division in inner
# loops.
_DYNAMO_OPTIONS = {"recompile_limit": 64, "specialize_float": True}

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T", bound="DataclassInstance")
R = TypeVar("R")


def compiler_missing(device_type: str) -> str | None:
    """Return why ``compiled`` cannot run on a device, or None if it can."""
    if device_type == "cuda":
        return None if _triton_is_installed() else "Triton is not installed (`pip install triton`)"
    # The compiler that torch._inductor.config.cpp.cxx uses; it does not look for others.
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if not shutil.which(compiler):
        return f"there is no C++ compiler {compiler} on PATH (Debian: `apt-get install g++`)"
    return None


def triton_missing(device_type: str, dtype: torch.dtype) -> str | None:
    """Return why ``triton`` cannot run on tensors of a device and dtype, or None if it can."""
    if not _triton_is_installed():
        return "Triton is not installed (`pip install triton`)"
    interprets = os.environ.get("TRITON_INTERPRET") == "1"
    if device_type != "cuda" and not (device_type == "cpu" and interprets):
        return "its kernels need a CUDA device, or on CPU Triton's interpreter: TRITON_INTERPRET=1"
    if dtype not in _TRITON_DTYPES:
        return f"its kernels take fp32, fp16 and bf16, not {dtype}"
    return None


def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def check_backend(backend: str) -> None:
    """Raise ValueError for an unknown backend."""
    if backend not in get_args(Backend):
        names = ", ".join(get_args(Backend))
        raise ValueError(f"`backend` ({backend}) is not valid; must be one of {names}.")


@functools.cache
def resolve_backend(
    backend: Backend, device_type: str, dtype: torch.dtype = torch.float32
) -> Literal["reference", "compiled", "triton"]:
    """Return the backend that runs; ``auto`` takes the fastest one available and logs it once.

    Raises:
        UnavailableError: the requested backend cannot run on the device.
        ValueError: ``backend`` is not the name of one.
    """
    check_backend(backend)
    if backend == "reference":
        return "reference"
    if backend == "auto":
        # On CPU Triton only interprets its kernels, for tests.
        can_run_triton = device_type == "cuda" and triton_missing(device_type, dtype) is None
        return _fastest(device_type, can_run_triton)
    missing = (
        triton_missing(device_type, dtype) if backend == "triton" else compiler_missing(device_type)
    )
    if missing:
        raise UnavailableError(
            f"The `{backend}` activation backend cannot run on {device_type}: {missing}; or use "
            '`--model.activation_backend auto` (of an operator: `backend="auto"`).'
        )
    return backend


@functools.cache
def _fastest(device_type: str, can_run_triton: bool) -> Literal["reference", "compiled", "triton"]:
    missing = compiler_missing(device_type)
    if can_run_triton:
        logger.info("activation backend: triton")
        return "triton"
    logger.info("activation backend: %s", f"reference: {missing}" if missing else "compiled")
    return "reference" if missing else "compiled"


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Compile a function of rows with ``torch.compile``.

    Shapes are dynamic, so that the number of rows is not part of the code: one compilation for each
    combination of order, dtype and optional arguments serves every number of tokens. Inductor
    specialises on 0 and 1 rows, so these run uncompiled.
    """
    run_compiled = torch.compile(function, dynamic=True, fullgraph=True)

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        x: Any = args[0]
        if x.shape[0] <= 1:
            return function(*args, **kwargs)
        with torch._dynamo.config.patch(_DYNAMO_OPTIONS):
            return run_compiled(*args, **kwargs)

    return run


def load_functions(kind: type[T], backend: str, reference: ModuleType, kernels: str) -> T:
    """Collect the functions of one backend.

    Args:
        kind: dataclass with one field for each function, of the function's name.
        backend: resolved.
        reference: module of the functions in plain PyTorch, which ``compiled`` compiles.
        kernels: name of the module that launches Triton kernels; imported only if it runs.
    """
    module = importlib.import_module(kernels) if backend == "triton" else reference
    functions = {field.name: getattr(module, field.name) for field in fields(kind)}
    if backend == "compiled":
        functions = {name: compiled(function) for name, function in functions.items()}
    return kind(**functions)
