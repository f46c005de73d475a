"""The real pre-training job, from its command line to its metrics."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megapoly.pretrain import main
from megapoly.testing.ranks import run_on_ranks

RECIPES = Path(__file__).parents[2] / "examples" / "configs"


def run_job(
    recipe: str, run_dir: Path, overrides: Mapping[str, Any], *, num_ranks: int = 1
) -> list[dict[str, float]]:
    """Pre-train and return the lines of ``metrics.jsonl``.

    Args:
        recipe: name of a file in ``examples/configs``.
        run_dir: of the run; one that holds a checkpoint goes on from it.
        overrides: dotted names and values, as on the command line.
        num_ranks: processes, one thread each.

    Raises:
        RuntimeError: the job failed.
    """
    words = [f"--{name}={value}" for name, value in overrides.items()]
    words.append(f"--run_dir={run_dir}")
    run_on_ranks(_job, num_ranks, words, str(RECIPES / f"{recipe}.yaml"))
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def _job(words: list[str], recipe: str) -> None:
    status = main(words, default_recipe=Path(recipe), program="pretrain")
    if status:
        raise RuntimeError(f"the job ended with status {status}")
