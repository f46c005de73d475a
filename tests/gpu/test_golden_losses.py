"""The golden losses are this code's, and the checks for a GPU run and can fail."""

from __future__ import annotations

import math

import golden
import pytest
from golden import KEYS, RECIPES, STEPS, largest_difference, train
from gpu_jobs import check_bf16, check_checkpoint, check_fp32, check_metrics_and_trace


@pytest.fixture(autouse=True)
def plain_torch(monkeypatch):
    """Use the backend of the golden losses, without compiling."""
    monkeypatch.setitem(golden.OVERRIDES, "model.activation_backend", "reference")


@pytest.mark.parametrize("recipe", RECIPES)
def test_first_steps_on_cpu(recipe, tmp_path):
    lines = train(recipe, tmp_path, device="cpu", num_steps=3, options={})
    expected = golden.golden(recipe)
    for key in KEYS:
        assert len(expected[key]) == STEPS
        assert largest_difference(lines, recipe, key) < 1e-5
    # The model has learned: an untrained one has the loss ln 4096.
    assert abs(expected["lm_loss"][0] - math.log(4096)) < 0.1
    assert expected["lm_loss"][-1] < 7.5


def test_checks_of_precisions_run_on_cpu(tmp_path):
    check_fp32("dense_tiny", tmp_path / "fp32", device="cpu", num_steps=2)
    check_bf16("moe_tiny", tmp_path / "bf16", device="cpu", num_steps=2)


def test_checks_of_checkpoints_and_traces_run_on_cpu(tmp_path):
    check_checkpoint("moe_tiny", tmp_path / "saved", first="cpu", second="cpu", num_steps=4)
    check_metrics_and_trace(tmp_path / "trace", device="cpu", device_name="CPU, 1 thread")


@pytest.mark.parametrize(
    "check, option, value",
    [
        (check_fp32, "model.activation_eps", 1e-3),
        (check_bf16, "model.activation", "polyrelunorm"),
    ],
)
def test_checks_see_another_model(check, option, value, tmp_path, monkeypatch):
    monkeypatch.setitem(golden.OVERRIDES, option, value)
    with pytest.raises(AssertionError, match="lm_loss"):
        check("dense_tiny", tmp_path, device="cpu", num_steps=3)
