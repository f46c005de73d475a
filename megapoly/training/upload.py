"""Copy the checkpoints of a run to an object store while it trains."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from megapoly.errors import CheckpointError
from megapoly.platform.processes import dying_with_this_process
from megapoly.training.hooks import CheckpointHook, Hook, StepRecord


class UploadHook(Hook):
    """Copies each new checkpoint to ``checkpoint.upload``, on rank 0, with ``megapoly copy``.

    One is copied at a time, by another process; of several that are saved meanwhile the newest is
    copied next. The end of the run waits for its last one.

    Args:
        url: of the run in the store.
        checkpoints: saves the run; before this hook.
        show: shows a line to the user.
    """

    def __init__(self, url: str, checkpoints: CheckpointHook, show: Callable[[str], None]) -> None:
        self._url, self._checkpoints, self._show = url, checkpoints, show
        self._process: subprocess.Popen[str] | None = None
        self._copied: Path | None = None  # or tried

    def after_record(self, step: StepRecord) -> None:
        """Begin to copy a new checkpoint, unless an earlier one is still copied."""
        if self._process is not None and self._process.poll() is not None:
            self._show(self._outcome())
        if self._process is None and self._checkpoints.saved != self._copied:
            self._start()

    def at_end(self) -> None:
        """Copy the last checkpoint, and wait for it.

        Raises:
            CheckpointError: it could not be copied.
        """
        if self._process is not None:
            self._show(self._outcome())
        if self._checkpoints.saved != self._copied:
            self._start()
            outcome = self._outcome()
            if outcome.startswith(_WARNING):
                raise CheckpointError(outcome.removeprefix(_WARNING))
            self._show(outcome)

    def close(self) -> None:
        """End the process that still copies; only after an error there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()

    def _start(self) -> None:
        self._copied = self._checkpoints.saved
        self._process = subprocess.Popen(
            [sys.executable, "-m", "megapoly", "copy", str(self._copied), self._url],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            preexec_fn=dying_with_this_process(),
        )

    def _outcome(self) -> str:
        """Wait for the process and return a line about the checkpoint that it copied."""
        assert self._process is not None
        printed, errors = self._process.communicate()
        status, self._process = self._process.returncode, None
        if status == 0:
            return f"copied to {printed.strip()}"
        reason = errors.strip().splitlines()[-1:] or [f"exit status {status}"]
        return f"{_WARNING}{self._copied} was not copied to {self._url}: {reason[0]}"


_WARNING = "warning: "
