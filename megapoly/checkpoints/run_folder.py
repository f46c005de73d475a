"""Where a run keeps its checkpoints: ``RUN_DIR/checkpoints/iter_0000100``."""

from __future__ import annotations

import logging
import os
import re
import shutil
from pathlib import Path

logger = logging.getLogger(__name__)

_FOLDER = "checkpoints"
_NAME = re.compile(r"iter_(\d{7,})")


def checkpoints_folder(run_dir: str | Path) -> Path:
    """Return the folder of a run's checkpoints."""
    return Path(run_dir) / _FOLDER


def checkpoint_path(run_dir: str | Path, iteration: int) -> Path:
    """Return the folder of the checkpoint after a step."""
    return checkpoints_folder(run_dir) / f"iter_{iteration:07d}"


def partial_path(checkpoint: Path) -> Path:
    """Return the hidden folder in which a checkpoint is written, or deleted."""
    return checkpoint.with_name(f".{checkpoint.name}.partial")


def complete_checkpoints(run_dir: str | Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first; folders of other names are ignored.

    ``run.json`` is written last, so a checkpoint that has it is complete.
    """
    return [path for path in checkpoint_names(run_dir) if os.path.exists(path / "run.json")]


def checkpoint_names(run_dir: str | Path) -> list[Path]:
    """Return everything with a checkpoint's name in a run, oldest first, complete or not."""
    found = checkpoints_folder(run_dir).glob("iter_*")
    by_step = {step: path for path in found if (step := iteration_of(path.name)) is not None}
    return [path for _, path in sorted(by_step.items())]


def iteration_of(name: str) -> int | None:
    """Return the step of a checkpoint's name; None for other names."""
    match = _NAME.fullmatch(name)
    return None if match is None else int(match[1])


def delete_unfinished(run_dir: str | Path) -> None:
    """Delete what jobs that were killed left of checkpoints, which may fill a disk.

    A line names what cannot be deleted, such as a file that another host still has open on NFS.
    """
    for path in checkpoints_folder(run_dir).glob(".iter_*.partial"):
        try:
            delete_all(path)
        except OSError as error:
            logger.warning("%s is left of a checkpoint and cannot be deleted: %s", path, error)


def delete_all(path: Path) -> None:
    """Delete a checkpoint; of a link to one that is kept elsewhere, only the link.

    Raises:
        OSError: a file cannot be deleted.
    """
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path)


def step_of(checkpoint: Path) -> int:
    """Return the step after which a checkpoint of :func:`complete_checkpoints` was saved."""
    return int(checkpoint.name.removeprefix("iter_"))


def run_of(checkpoint: Path) -> Path | None:
    """Return the run that contains a checkpoint; None if it is in another folder."""
    folder = checkpoint.resolve().parent
    return folder.parent if folder.name == _FOLDER else None
