"""Choose the checkpoint to use: the newest that is whole. Damaged ones are named."""

from __future__ import annotations

import itertools
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from megapoly.checkpoints.run_file import NAME as RUN
from megapoly.checkpoints.run_file import DamageError, read_run_file
from megapoly.checkpoints.run_folder import (
    checkpoint_names,
    checkpoints_folder,
    complete_checkpoints,
)
from megapoly.checkpoints.verify import ALONE, Ranks, Verdict, total_bytes, verify
from megapoly.errors import CheckpointError
from megapoly.platform.files import SEEN_WITHIN_S, wait_until_seen
from megapoly.platform.progress import bytes_bar

logger = logging.getLogger(__name__)

# What this process has verified: a command that opens a checkpoint several times verifies it once,
# unless a file of it has changed.
_verdicts: dict[tuple[object, ...], Verdict] = {}


def check_whole(folder: Path, ranks: Ranks = ALONE) -> None:
    """Check that a checkpoint that the user named is whole; collective.

    Raises:
        CheckpointError: a file is damaged or missing, with the remedy.
    """
    if not ranks.gather(os.path.exists(folder / RUN))[0]:
        raise CheckpointError(
            f"{folder} is not a complete checkpoint (it has no {RUN}); give the path of an "
            "`iter_*` folder."
        )
    if unseen := _unseen(folder, ranks):
        raise CheckpointError(unseen)
    verdict = verdict_of(folder, ranks)
    if verdict.damages:
        raise CheckpointError(
            f"{folder} is damaged: {verdict}. Give another checkpoint, or a run, whose newest "
            "checkpoint that is whole is taken."
        )


def newest_whole(run_dir: Path, ranks: Ranks = ALONE) -> Path | None:
    """Return the newest checkpoint of a run that is whole, the same on all ranks; collective.

    A damaged one is named in a line, and not changed.

    Returns:
        The checkpoint; None if the run has none.

    Raises:
        CheckpointError: all checkpoints of the run are damaged.
    """
    names = [path for path in checkpoint_names(run_dir) if is_checkpoint(path)]
    whole, damaged = _newest_whole(run_dir, _on_rank_zero(run_dir, names, ranks), ranks)
    for path, verdict in damaged.items() if ranks.rank == 0 else ():
        logger.warning("%s is damaged: %s. %s is used instead", path, verdict, whole)
    return whole


def newest_to_resume(run_dir: Path, ranks: Ranks = ALONE) -> Path | None:
    """Return what :func:`newest_whole` returns, and set aside what is damaged; collective.

    What has a checkpoint's name and is none, such as a folder without ``run.json``, is set aside
    too, for it would be in the way of the next save.

    Raises:
        CheckpointError: all checkpoints of the run are damaged; none is set aside then.
    """
    names = checkpoint_names(run_dir)
    candidates = _on_rank_zero(run_dir, [path for path in names if is_checkpoint(path)], ranks)
    whole, damaged = _newest_whole(run_dir, candidates, ranks)
    if ranks.rank == 0:
        for path, verdict in damaged.items():
            logger.warning("%s is damaged: %s. %s", path, verdict, set_aside(path))
        for path in names:
            if path not in candidates:
                logger.warning("%s is not a complete checkpoint. %s", path, set_aside(path))
    ranks.gather(None)  # all see the names that are left
    return whole


def newest_description(run_dir: Path) -> dict[str, Any]:
    """Return ``run.json`` of the newest checkpoint; empty if a run has none.

    Only ``run.json`` itself is verified, for tables that do not open the checkpoint. A damaged one
    is named in a line, and the one before it is read.
    """
    for path in reversed(complete_checkpoints(run_dir)):
        try:
            return read_run_file(path)
        except DamageError as error:
            logger.warning("%s is damaged: %s", path, error)
    return {}


def newest_ordinary(run_dir: str | Path) -> Path | None:
    """Return the newest complete checkpoint before which no loss was unusual; None without one.

    Its ``run.json`` says so. Only that file is verified.
    """
    for path in reversed(complete_checkpoints(run_dir)):
        try:
            if read_run_file(path).get("is_ordinary", True):
                return path
        except DamageError:
            continue
    return None


def set_aside(path: Path, kind: str = "damaged") -> str:
    """Rename a checkpoint that is not to be used; return a sentence that says so.

    Args:
        path: its folder.
        kind: why, the ending of its name.
    """
    aside = path.with_name(f"{path.name}.{kind}")
    for number in itertools.count(2):
        if not os.path.lexists(aside):
            break
        aside = path.with_name(f"{path.name}.{kind}.{number}")
    try:
        path.rename(aside)
    except OSError as error:
        return f"It cannot be set aside ({error.strerror})"
    return f"It is set aside as {aside.name}"


def is_checkpoint(path: Path) -> bool:
    """Return whether a path is a checkpoint, whole or damaged, and no leftover of a crash.

    ``run.json`` is written last; where it is missing, another file shows that all was written.
    """
    return os.path.exists(path / RUN) or os.path.exists(path / ".metadata")


def make_room(path: Path) -> None:
    """Rename what has the name of a checkpoint that is about to be complete, on rank 0."""
    if os.path.lexists(path):
        logger.warning("%s is in the way of a checkpoint. %s", path, set_aside(path))


def verdict_of(folder: Path, ranks: Ranks = ALONE) -> Verdict:
    """Return what verifying a checkpoint finds; verify it once in this process; collective.

    A line says so if the checkpoint cannot be verified.
    """
    key = _state_of_files(folder)
    known = _verdicts.get(key)
    if not all(ranks.gather(known is not None)) or known is None:
        known = _verdicts[key] = _verify(folder, ranks)
        if not known.is_sealed and not known.damages and ranks.rank == 0:
            logger.warning(
                "%s is not verified: its run.json has no sizes and CRC-32 of its files", folder
            )
    return known


def _verify(folder: Path, ranks: Ranks) -> Verdict:
    """Verify a checkpoint; rank 0 shows how far it is, on a terminal."""
    if ranks.rank != 0:
        return verify(folder, ranks)
    share, console = total_bytes(folder) // ranks.num_ranks, Console(stderr=True)
    with bytes_bar(f"verifying {folder}", share, console, transient=True) as advance:
        return verify(folder, ranks, advance)


def _state_of_files(folder: Path) -> tuple[object, ...]:
    """Return name, size and time of all files."""
    state: list[object] = [str(folder.absolute())]
    for path, found in _files(folder):
        if found is None:
            state.append((path, None))
        else:
            state.append((path, found.st_ino, found.st_size, found.st_mtime_ns))
    return tuple(state)


def _files(folder: Path) -> Iterator[tuple[str, os.stat_result | None]]:
    """Yield the files below a folder, each with what the system says of it, if it does."""
    for inner, _, names in os.walk(folder):
        for name in sorted(names):
            path = os.path.join(inner, name)
            try:
                yield path, os.stat(path)
            except OSError:
                yield path, None


def _newest_whole(
    run_dir: Path, candidates: list[Path], ranks: Ranks
) -> tuple[Path | None, dict[Path, Verdict]]:
    """Return the newest candidate that is whole, and the damaged ones after it.

    Raises:
        CheckpointError: all candidates are damaged, or a rank does not see one that rank 0 sees.
    """
    damaged: dict[Path, Verdict] = {}
    for path in reversed(candidates):
        if (unseen := _unseen(path, ranks)) and ranks.gather(path.exists())[0]:
            raise CheckpointError(unseen)
        verdict = verdict_of(path, ranks)
        if not verdict.damages:
            return path, damaged
        if all(ranks.gather(path.exists())):  # a run that trains deletes old ones
            damaged[path] = verdict
    if damaged:
        raise CheckpointError(_all_damaged(run_dir, damaged))
    return None, damaged


def _on_rank_zero(run_dir: Path, paths: list[Path], ranks: Ranks) -> list[Path]:
    """Return the checkpoints that rank 0 sees, on all ranks, where the run may have other paths."""
    names = ranks.gather([path.name for path in paths])[0]
    return [checkpoints_folder(run_dir) / name for name in names]


def _unseen(folder: Path, ranks: Ranks) -> str:
    """Return which rank does not see the files of a checkpoint that rank 0 sees; collective.

    Without this they would be missing, and the checkpoint damaged. A late file system is waited
    for.
    """
    if ranks.num_ranks == 1:
        return ""
    sizes = {name: size for name, size in ranks.gather(_sizes(folder))[0]}
    unseen = wait_until_seen(folder, sizes, SEEN_WITHIN_S)
    problem = ""
    if unseen:
        name, seen = next(iter(unseen.items()))
        problem = f"rank {ranks.rank} on {socket.gethostname()}, where {name} {seen}"
    problems = [each for each in ranks.gather(problem) if each]
    if not problems:
        return ""
    more = f" and {len(problems) - 1} more ranks" if len(problems) > 1 else ""
    return (
        f"{folder} must be the same checkpoint on all hosts of the job, and is another for "
        f"{problems[0]}{more}, {SEEN_WITHIN_S:g} s after rank 0 saw it; mount its file system on "
        "each host, or copy the checkpoint to each"
    )


def _sizes(folder: Path) -> list[tuple[str, int]]:
    """Return name and size in bytes of the files of a checkpoint that can be seen."""
    return [
        (os.path.relpath(path, folder), found.st_size)
        for path, found in _files(folder)
        if found is not None
    ]


def _all_damaged(run_dir: Path, damaged: dict[Path, Verdict]) -> str:
    found = "; ".join(f"{path.name}: {verdict}" for path, verdict in damaged.items())
    count = f"All {len(damaged)} checkpoints" if len(damaged) > 1 else "The only checkpoint"
    return (
        f"{count} of {run_dir} {'are' if len(damaged) > 1 else 'is'} damaged: {found}. Restore a "
        "checkpoint from a copy, or use another `run_dir`; to train this run from its beginning, "
        "delete its folder."
    )
