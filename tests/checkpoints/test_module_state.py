"""The state of Transformer Engine's modules is checked before it unpickles it.

Real ones, with a recipe, are loaded in ``tests/model/test_transformer_engine.py``.
"""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megapoly.checkpoints.module_state import check_module_state
from megapoly.errors import CheckpointError


class Touch:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


class Storage:
    """A pickled storage, as a tensor has it, with other content."""

    def __init__(self, content: Any):
        stream = io.BytesIO()
        torch.save(content, stream)
        self.data = stream.getvalue()

    def __reduce__(self) -> Any:
        return torch.storage._load_from_bytes, (self.data,)


def state_of(content: Any) -> Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(content)), dtype=torch.uint8)


def test_tensors_and_numbers_pass() -> None:
    content = {
        "scale_fwd": torch.ones(3),
        "amax_history_fwd": torch.rand(1024, 3),
        "extra_fp8_variables": {"num_gemms": 1, "fp8_checkpoint": True},
    }
    for state in (None, torch.empty(0, dtype=torch.uint8), state_of(content), state_of(None)):
        check_module_state("_extra_state", state)


def test_code_is_refused_and_not_executed(tmp_path: Path) -> None:
    executed = tmp_path / "executed"
    code = Touch(executed)
    whole = state_of({"scale_fwd": torch.ones(3)})
    for state in (state_of(code), state_of({"recipe": code}), state_of(Storage(code)), whole[:-9]):
        with pytest.raises(CheckpointError, match="`layers.0._extra_state` is damaged, or names"):
            check_module_state("layers.0._extra_state", state)
    assert not executed.exists()
    for other in (io.BytesIO(), torch.ones(3), {"a": 1}):
        with pytest.raises(CheckpointError, match="is no state of a module"):
            check_module_state("_extra_state", other)
