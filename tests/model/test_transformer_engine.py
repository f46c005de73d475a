"""Transformer Engine asked for where it is not installed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megapoly.config import configure
from megapoly.errors import ConfigError
from megapoly.platform import this_machine

RECIPE = Path(__file__).parents[2] / "examples" / "configs" / "moe_tiny.yaml"

pytestmark = pytest.mark.skipif(
    this_machine().transformer_engine, reason="Transformer Engine is installed"
)


def problems_of(*words):
    with pytest.raises(ConfigError) as error:
        configure(
            ["--model.transformer_engine", "true", *words], default_recipe=RECIPE, program="test"
        )
    return error.value.problems


def test_on_cuda_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    (problem,) = problems_of("--training.device", "cuda")
    assert "`pip install '.[gpu]'`" in problem
    assert "`model.transformer_engine` (True)" in problem


def test_on_cpu_the_error_says_that_it_needs_cuda():
    (problem,) = problems_of("--training.device", "cpu")
    assert "needs `training.device` cuda, not cpu" in problem
