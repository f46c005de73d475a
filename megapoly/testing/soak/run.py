"""A run under test: its checkpoints and metrics, and what is wrong with them."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megapoly.checkpoints.run_folder import complete_checkpoints, step_of
from megapoly.testing.soak.equal_runs import checkpoints_differ, metrics_differ, metrics_of
from megapoly.testing.soak.started_jobs import NanStep


@dataclass(frozen=True)
class Reference:
    """The uninterrupted run.

    Args:
        folder: its run folder.
        nan_steps: steps that met NaN in it, and meet it in each run that is compared with it.
        seconds_of_a_save: from its first to its last file, to choose moments by.
        seconds_of_start: from the start of the job to its first step.
    """

    folder: Path
    nan_steps: tuple[NanStep, ...]
    seconds_of_a_save: float
    seconds_of_start: float

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``."""
        return metrics_of(self.folder)


@dataclass
class Run:
    """A run that meets faults.

    Args:
        folder: its run folder.
        reference: what it must equal.
    """

    folder: Path
    reference: Reference
    expected: list[dict[str, Any]] = field(init=False)

    def __post_init__(self) -> None:
        self.expected = self.reference.metrics

    @property
    def last_step(self) -> int:
        """The step at which it is complete."""
        return int(self.expected[-1]["iteration"])

    def checkpoints(self) -> list[Path]:
        """Return the complete checkpoints, oldest first."""
        return complete_checkpoints(self.folder)

    def saved_step(self) -> int:
        """Return the step of the newest complete checkpoint, 0 if there is none."""
        found = self.checkpoints()
        return step_of(found[-1]) if found else 0

    def recorded_step(self) -> int:
        """Return the last step in ``metrics.jsonl``, 0 if there is none."""
        lines = metrics_of(self.folder)
        return int(lines[-1]["iteration"]) if lines else 0

    def partial_checkpoints(self) -> set[int]:
        """Return the inodes of incomplete checkpoints: being written, or left by a kill."""
        found = set()
        for folder in (self.folder / "checkpoints").glob(".iter_*"):
            with contextlib.suppress(FileNotFoundError):
                found.add(folder.stat().st_ino)
        return found

    def largest_file(self) -> int:
        """Return the bytes of the largest file in the checkpoints; the run may be deleting one."""
        sizes = [0]
        for path in self.checkpoints():
            with contextlib.suppress(FileNotFoundError):
                sizes += [file.stat().st_size for file in path.iterdir()]
        return max(sizes)

    def problems(self) -> Iterator[str]:
        """Yield what differs from the uninterrupted run so far."""
        if (problem := metrics_differ(metrics_of(self.folder), self.expected)) is not None:
            yield problem

    def problems_at_end(self) -> Iterator[str]:
        """Yield what differs from the uninterrupted run, of a complete run."""
        found, last = metrics_of(self.folder), self.reference.folder
        if (problem := metrics_differ(found, self.expected, whole=True)) is not None:
            yield problem
        if self.saved_step() != self.last_step:
            yield f"the newest checkpoint is of step {self.saved_step()}, not {self.last_step}"
            return
        checkpoint = self.checkpoints()[-1]
        problem = checkpoints_differ(checkpoint, last / checkpoint.relative_to(self.folder))
        if problem is not None:
            yield problem

    def delete(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder)
