"""Checks for a GPU as functions of the device, so that they also run on CPU."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

from golden import golden, largest_difference, train

from megapoly.platform.gpus import gpu_of_device

# Relative, of losses. In fp32 the compiled form of the activation and the plain one differ by 7e-8
# over the 20 steps on CPU, gradient norms by 4e-6.
FP32_LOSS, FP32_GRAD_NORM = 1e-5, 1e-3
# On CPU bf16 differs from fp32 by 3e-4; gradient norms of the mixture of experts by much more.
BF16_LOSS = 2e-3


def check_fp32(recipe: str, folder: Path, *, device: str, num_steps: int) -> None:
    """Check that losses and gradient norms are the golden ones."""
    lines = train(recipe, folder, device=device, num_steps=num_steps, options={})
    assert len(lines) == num_steps
    assert largest_difference(lines, recipe, "lm_loss") < FP32_LOSS
    assert largest_difference(lines, recipe, "grad_norm") < FP32_GRAD_NORM


def check_bf16(recipe: str, folder: Path, *, device: str, num_steps: int) -> None:
    """Check that losses are the golden ones except for the rounding of bf16, which is visible."""
    options = {"training.bf16": True}
    lines = train(recipe, folder, device=device, num_steps=num_steps, options=options)
    assert len(lines) == num_steps
    assert 1e-6 < largest_difference(lines, recipe, "lm_loss") < BF16_LOSS


def check_checkpoint(recipe: str, folder: Path, *, first: str, second: str, num_steps: int) -> None:
    """Check that a run of one device resumes on another with the golden losses."""
    options = {"checkpoint.save": True}
    train(recipe, folder, device=first, num_steps=num_steps // 2, options=options)
    lines = train(recipe, folder, device=second, num_steps=num_steps, options=options)
    assert [line["iteration"] for line in lines] == list(range(1, num_steps + 1))
    assert largest_difference(lines, recipe, "lm_loss") < FP32_LOSS


def check_metrics_and_trace(folder: Path, *, device: str, device_name: str) -> None:
    """Check that speed is reported against the device's peak and a trace has the device's work."""
    options = {
        "logging.profile": True,
        "logging.profile_step_start": 3,
        "logging.profile_step_end": 3,
    }
    line = train("dense_tiny", folder, device=device, num_steps=3, options=options)[-1]
    assert line["lm_loss"] < golden("dense_tiny")["lm_loss"][0]
    gpu = gpu_of_device(device_name)
    assert line.get("peak_tflops") == (None if gpu is None else gpu.bf16_flops / 1e12)
    assert ("mfu" in line) == (gpu is not None)
    assert line["tflops_per_device"] > 0
    assert ("max_memory_allocated_bytes" in line) == (device == "cuda")
    with gzip.open(folder / "profile" / "rank_0.steps_3-3.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    kinds = Counter(event.get("cat") for event in events)
    assert kinds["cpu_op"] > 100
    assert (kinds["kernel"] > 100) == (device == "cuda")
