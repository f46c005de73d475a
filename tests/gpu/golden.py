"""Losses of small models on CPU in fp32, the reference for other devices and precisions.

    python tests/gpu/golden.py

computes them again and writes ``golden_losses.json``. They change if the model, its initial
weights, the order of the data or the optimizer changes, and only then.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megapoly.testing import run_job

FILE = Path(__file__).with_name("golden_losses.json")
RECIPES = ("dense_tiny", "moe_tiny")
STEPS = 20
# The recipes' models on smaller batches, with a schedule that does not depend on the steps made. At
# the recipes' learning rate so small a batch makes the mixture of experts' loss jump, by other
# amounts with every other rounding.
OVERRIDES = {
    "training.seq_length": 128,
    "training.micro_batch_size": 2,
    "training.global_batch_size": 4,
    "training.eval_interval": 0,
    "optimizer.lr": 5e-4,
    "optimizer.min_lr": 5e-5,
    "optimizer.lr_warmup_iters": 5,
    "optimizer.lr_decay_iters": STEPS,
    "model.transformer_engine": False,
    "checkpoint.save": False,
    "logging.tensorboard": False,
}
KEYS = ("lm_loss", "grad_norm")


def train(
    recipe: str, run_dir: Path, *, device: str, num_steps: int, options: Mapping[str, Any]
) -> list[dict[str, float]]:
    """Train, and return the lines of ``metrics.jsonl``.

    Args:
        recipe: one of ``RECIPES``.
        run_dir: of the job.
        device: ``cpu`` or ``cuda``.
        num_steps: at most ``STEPS``.
        options: more overrides.
    """
    overrides = {"training.device": device, "training.train_iters": num_steps}
    return run_job(recipe, run_dir, OVERRIDES | overrides | dict(options))


def golden(recipe: str) -> dict[str, list[float]]:
    """Return the values of every step, by key of ``KEYS``."""
    return json.loads(FILE.read_text())["recipes"][recipe]


def largest_difference(metrics: list[dict[str, float]], recipe: str, key: str) -> float:
    """Return the largest relative difference of a job's steps from the golden ones."""
    expected = golden(recipe)[key]
    return max(
        abs(line[key] - expected[int(line["iteration"]) - 1]) / expected[int(line["iteration"]) - 1]
        for line in metrics
    )


def main() -> None:
    """Write the file."""
    recipes = {}
    for recipe in RECIPES:
        with tempfile.TemporaryDirectory() as folder:
            # Plain torch code, which is the same on every device.
            options = {"model.activation_backend": "reference"}
            lines = train(recipe, Path(folder), device="cpu", num_steps=STEPS, options=options)
        recipes[recipe] = {key: [line[key] for line in lines] for key in KEYS}
    record = {
        "command": "python tests/gpu/golden.py",
        "torch": torch.__version__,
        "recipes": recipes,
    }
    FILE.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
