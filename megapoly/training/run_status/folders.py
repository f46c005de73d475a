"""Find runs, and what their folders say where there is no ``status.json``.

Needs the standard library alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megapoly.checkpoints.run_folder import checkpoints_folder, complete_checkpoints, step_of
from megapoly.platform.json_lines import last_record
from megapoly.training.run_lock import is_held
from megapoly.training.run_status.record import NAME, RunStatus, SavedCheckpoint

METRICS = "metrics.jsonl"
_DEEPEST = 4  # folders between the one that was given and a run
# Scalars of a step by their names in metrics.jsonl.
_NAMES = {
    "lm_loss": "loss",
    "grad_norm": "grad_norm",
    "learning_rate": "learning_rate",
    "tokens_per_second": "tokens_per_second",
    "step_time_s": "step_time_s",
    "mfu": "mfu",
    "max_memory_allocated_bytes": "gpu_memory_bytes",
    "time": "last_step",
}
_TRAIN_ITERS = re.compile(r"^ +train_iters: (\d+)$", re.MULTILINE)


def is_run(folder: Path) -> bool:
    """Return whether a folder is that of a run that has begun."""
    return (folder / NAME).is_file() or (folder / METRICS).is_file()


def runs_below(folder: Path) -> list[Path]:
    """Return the folder itself if it is a run's, else the runs below it, in order of their names.

    Folders that cannot be read are left out.
    """
    return sorted(_walk(folder, _DEEPEST))


def _walk(folder: Path, depth: int) -> Iterator[Path]:
    if is_run(folder):
        yield folder
    elif depth >= 0:
        try:
            entries = [each for each in os.scandir(folder) if not each.name.startswith(".")]
        except OSError:
            return
        for entry in entries:
            if entry.is_dir():
                yield from _walk(folder / entry.name, depth - 1)


def values_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields of a status from a line of ``metrics.jsonl``, those that the line has."""
    values = {field: record[name] for name, field in _NAMES.items() if name in record}
    losses = {
        name[len("val/") : -len("/loss")]: value
        for name, value in record.items()
        if name.startswith("val/") and name.endswith("/loss")
    }
    tasks = {
        name.removeprefix("task/"): value
        for name, value in record.items()
        if name.startswith("task/")
    }
    return values | ({"validation": losses} if losses else {}) | ({"tasks": tasks} if tasks else {})


def newest_checkpoint(run_dir: Path) -> SavedCheckpoint | None:
    """Return the newest complete checkpoint of a run; None if it has none."""
    found = complete_checkpoints(run_dir) if checkpoints_folder(run_dir).is_dir() else []
    return saved_checkpoint(found[-1]) if found else None


def saved_checkpoint(path: Path) -> SavedCheckpoint:
    """Return a complete checkpoint with the time at which its last file was written."""
    try:
        time = (path / "run.json").stat().st_mtime
    except OSError:  # deleted since, or a disk that is gone
        time = None
    return SavedCheckpoint(str(path), step_of(path), time)


def status_of_files(run_dir: Path) -> RunStatus:
    """Return what is known of a run without ``status.json``, as of an earlier version.

    Its state is ``training`` while a job of this machine holds the folder's lock, ``complete``
    after the last step, and ``unknown`` otherwise.
    """
    record = last_record(run_dir / METRICS)
    status = RunStatus(str(run_dir), train_iters=_train_iters(run_dir), state="unknown")
    for name, value in values_of(record).items():
        setattr(status, name, value)
    status.step = record.get("iteration", 0)
    status.consumed_tokens = record.get("consumed_tokens")
    status.checkpoint = newest_checkpoint(run_dir)
    if status.last_step is None:
        try:
            status.last_step = (run_dir / METRICS).stat().st_mtime
        except OSError:
            pass
    if is_held(run_dir):
        status.state = "training"
    elif status.train_iters is not None and status.step >= status.train_iters:
        status.state = "complete"
    return status


def _train_iters(run_dir: Path) -> int | None:
    """Return the steps of a run; by its text, for YAML takes longer to load than a probe may."""
    try:
        found = _TRAIN_ITERS.search((run_dir / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return None if found is None else int(found[1])
