"""Transformer Engine's Python code without its compiled part, which needs CUDA's libraries.

The wheel ``transformer-engine`` on the package index has all of its Python code and none of its
kernels. With a stand-in for the compiled extension it can be imported without a GPU, so that the
real modules are built, with Transformer Engine's own signatures, parameters and checkpoint entries.
Functions that would compute raise :class:`NotImplementedError`.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

_EXTENSION = "transformer_engine_torch"
_CUDNN = 91301  # 9.13.1: decides which attention kernels would be used
# Export to ONNX, which needs two large packages that are not used here.
_LEFT_OUT = "transformer_engine.pytorch.onnx_extensions"


class _Names(type):
    """An enumeration, or a class to derive from, that has every member."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        member = cls()
        member.name = name
        setattr(cls, name, member)
        return member


class _StandIn(types.ModuleType):
    """A module that has every name: a class if it begins with a capital, else a function."""

    __all__: list[str]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = _Names(name, (), {}) if name[0].isupper() else _function(f"{self.__name__}.{name}")
        setattr(self, name, found)
        return found


def called_by_transformer_engine(depth: int = 0) -> bool:
    """Return whether the function that calls this was called by Transformer Engine.

    Args:
        depth: number of functions between the two.
    """
    module = sys._getframe(depth + 2).f_globals.get("__name__", "")
    return module.startswith("transformer_engine")


def _functions_used(folder: Path) -> list[str]:
    """Return the names that the package's modules use of the extension."""
    sources = (folder / "transformer_engine" / "pytorch").rglob("*.py")
    used = (re.findall(r"\b(?:tex|ext)\.([a-z]\w+)", source.read_text()) for source in sources)
    return sorted({name for names in used for name in names})


def _function(name: str) -> Any:
    def needs_gpu(*args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(f"{name} is a kernel of Transformer Engine's")

    return needs_gpu


def import_without_kernels(
    folder: Path, kernels: Mapping[str, Callable[..., Any]] = MappingProxyType({})
) -> types.ModuleType:
    """Import ``transformer_engine`` from a folder; once, in a separate process.

    Call it before the engine is imported and the platform is selected. Transformer Engine then
    finds a Hopper GPU in this process.

    Args:
        folder: target of ``pip install --no-deps --target`` for the wheel.
        kernels: functions of the compiled part, by name; all others only raise.

    Returns:
        The package.
    """
    sys.path.insert(0, str(folder))
    # The package then looks for no shared libraries when it is imported.
    os.environ["NVTE_PROJECT_BUILDING"] = "1"
    os.environ["NVTE_TORCH_COMPILE"] = "0"  # of small functions, which takes long
    extension = _StandIn(_EXTENSION)
    vars(extension).update({"get_cudnn_version": lambda: _CUDNN}, **kernels)
    extension.__all__ = _functions_used(folder)  # for modules that import all names
    sys.modules[_LEFT_OUT] = _StandIn(_LEFT_OUT)
    spec = importlib.util.find_spec("transformer_engine")
    assert spec is not None and spec.loader is not None, f"no transformer_engine in {folder}"
    package = importlib.util.module_from_spec(spec)
    sys.modules["transformer_engine"] = package
    # Importing the package itself would load the extension at once.
    common = importlib.import_module("transformer_engine.common")
    common.load_framework_extension = lambda framework: sys.modules.setdefault(  # type: ignore[attr-defined]
        f"transformer_engine_{framework}", extension
    )
    spec.loader.exec_module(package)
    importlib.import_module("transformer_engine.pytorch")  # its own import hides what goes wrong
    # Constructors look up a device (pytorch/module/base.py:606, pytorch/utils.py).
    is_available = torch.cuda.is_available
    torch.cuda.is_available = lambda: is_available() or called_by_transformer_engine()
    torch.cuda.get_device_properties = lambda *args: types.SimpleNamespace(major=9, minor=0)  # type: ignore[assignment]
    return package
