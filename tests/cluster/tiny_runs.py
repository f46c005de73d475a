"""The job that the tests of this folder train, and what it leaves in its folder."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from commands import TINY
from hosts import Host

from megapoly.testing import run_job
from megapoly.testing.jobs import shared_cache

SCRIPT = "examples/pretrain_dense.sh"


def job(run_dir: Path, *options: str) -> list[str]:
    """Return the script and the options of a job that trains until it is stopped."""
    fixed = ["--training.device=cpu", f"--run_dir={run_dir}"]
    fixed += [f"--data.cache_dir={shared_cache().name}", "--training.train_iters=100000"]
    return [SCRIPT, *TINY, *fixed, *options]


def results(run_dir: Path) -> list[dict[str, Any]]:
    """Return what the run computed in each step, to the bit, without what it measured."""
    names = ("iteration", "lm_loss", "grad_norm", "learning_rate", "consumed_tokens")
    file = run_dir / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [{name: line[name] for name in names} for line in map(json.loads, lines)]


def without_interruption(run_dir: Path, num_steps: int) -> list[dict[str, Any]]:
    """Return the results of the same job on two processes of one host, never interrupted."""
    pairs = dict(zip((name[2:] for name in TINY[::2]), TINY[1::2], strict=True))
    run_job(
        "dense_tiny",
        run_dir,
        pairs | {"training.train_iters": num_steps, "checkpoint.save": False},
        num_ranks=2,
    )
    return results(run_dir)


def checkpoint_steps(run_dir: Path) -> list[int]:
    """Return the steps of the checkpoints that are complete."""
    folder = run_dir / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return sorted(int(name[5:]) for name in names if re.fullmatch(r"iter_\d+", name))


def rank_of(host: Host, run_dir: Path) -> int:
    """Return the process of a host that trains in a folder, as the host counts."""
    for pid in host.find(SCRIPT, str(run_dir)):
        parent = host.read("ps", "-o", "ppid=", "-p", str(pid)).strip()
        command = host.read("ps", "-o", "args=", "-p", parent) if parent != "0" else ""
        own = host.read("ps", "-o", "args=", "-p", str(pid))
        if "megapoly-launch" in command and "megapoly-launch" not in own:
            return pid
    raise AssertionError(f"nothing trains in {run_dir} on {host.name}")
