"""Training with the engine's own layers on one GPU, against losses of the CPU."""

from __future__ import annotations

import pytest
import torch
from golden import RECIPES, STEPS
from gpu_jobs import check_bf16, check_checkpoint, check_fp32, check_metrics_and_trace

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("recipe", RECIPES)
def test_fp32_is_the_cpus(recipe, tmp_path):
    check_fp32(recipe, tmp_path, device="cuda", num_steps=STEPS)


@pytest.mark.parametrize("recipe", RECIPES)
def test_bf16_is_close_to_fp32(recipe, tmp_path):
    check_bf16(recipe, tmp_path, device="cuda", num_steps=STEPS)


@pytest.mark.parametrize("devices", [("cuda", "cpu"), ("cpu", "cuda")], ids="-to-".join)
def test_checkpoints_resume_on_the_other_device(devices, tmp_path):
    first, second = devices
    check_checkpoint("moe_tiny", tmp_path, first=first, second=second, num_steps=8)


def test_speed_and_trace(tmp_path):
    name = torch.cuda.get_device_name()
    check_metrics_and_trace(tmp_path, device="cuda", device_name=name)
