"""State of Transformer Engine's modules, ``_extra_state``: pickles that it unpickles by itself.

``TransformerEngineBaseModule.set_extra_state`` (transformer_engine/pytorch/module/base.py) and the
engine (extensions/transformer_engine.py:1687) call ``pickle.loads`` on them, so they are read here
before, by an unpickler that knows what such a state has.
"""

from __future__ import annotations

import collections
import io
import pickle
from typing import Any

import torch
from torch import Tensor

from megapoly.errors import CheckpointError

_RECIPES = "transformer_engine.common.recipe"
_NAMES: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
}


def check_module_state(name: str, state: Any) -> None:
    """Check that the state of a module is tensors, numbers and a recipe of FP8.

    Args:
        name: of the entry.
        state: what the checkpoint has: bytes, in a tensor; empty or None without FP8.

    Raises:
        CheckpointError: it is anything else.
    """
    if state is None:
        return
    if not isinstance(state, Tensor) or state.dtype != torch.uint8:
        raise CheckpointError(f"`{name}` is no state of a module of Transformer Engine")
    if state.numel() == 0:
        return
    try:
        _Unpickler(io.BytesIO(state.cpu().numpy().tobytes())).load()
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(f"`{name}` is damaged, or names code: {error}") from error


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _NAMES:
            return _NAMES[module, name]
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return _storage
        found = super().find_class(module, name) if module == _RECIPES and "." not in name else None
        if isinstance(found, type) and found.__module__ == _RECIPES:
            return found
        raise CheckpointError(f"`{module}.{name}` has no place in the state of a module")


def _storage(data: bytes) -> Any:
    """Return a tensor's storage; pickled tensors have theirs as bytes of ``torch.save``."""
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
