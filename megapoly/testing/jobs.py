"""The real pre-training job, from its command line to its metrics."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megapoly.config.recipes import FOLDER as RECIPES
from megapoly.preflight.local_ranks import run_on_ranks
from megapoly.pretrain import configure, pretrain


@functools.cache
def shared_cache() -> tempfile.TemporaryDirectory[str]:
    """Return the folder for tokenized text and sample indices of all jobs of this process."""
    return tempfile.TemporaryDirectory(prefix="megapoly-test-cache-")


def run_job(
    recipe: str, run_dir: Path, overrides: Mapping[str, Any], *, num_ranks: int = 1
) -> list[dict[str, float]]:
    """Pre-train and return the lines of ``metrics.jsonl``.

    Args:
        recipe: name of an installed recipe.
        run_dir: of the run; it resumes if the folder has a checkpoint.
        overrides: dotted names and values, as on the command line. The device is the CPU unless
            ``training.device`` is set, also on a machine with a GPU.
        num_ranks: processes, one thread each.

    Raises:
        RuntimeError: the job failed; with one rank's traceback.
    """
    fixed = {"run_dir": run_dir, "data.cache_dir": shared_cache().name, "training.device": "cpu"}
    options = fixed | dict(overrides)
    argv = [f"--{name}={value}" for name, value in options.items()]
    device = str(options["training.device"])
    run_on_ranks(_job, num_ranks, argv, str(RECIPES / f"{recipe}.yaml"), device=device)
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def _job(argv: list[str], recipe: str) -> None:
    """Do what ``megapoly.pretrain.main`` does, but raise errors."""
    pretrain(configure(argv, default_recipe=Path(recipe), program="pretrain"))
