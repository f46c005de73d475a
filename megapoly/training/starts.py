"""The starts of a run, ``RUN_DIR/starts.jsonl``, and whether its checkpoints advance.

A scheduler that starts a job again whenever it has lost a process would do so for ever where one
fails each time before the next checkpoint. After some starts from the same step the launcher
therefore ends with status 1, which no scheduler takes for "start again".
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from pathlib import Path
from typing import Any

from megapoly.checkpoints.run_folder import complete_checkpoints, step_of
from megapoly.platform import launcher
from megapoly.platform.json_lines import lines
from megapoly.training.hooks import CheckpointHook, Hook, StepRecord
from megapoly.training.rank_zero_first import RankZeroFirst

logger = logging.getLogger(__name__)

_FILE = "starts.jsonl"
# Starts of one job from one step, the last of which is not followed by another.
MOST_FROM_ONE_STEP = 3


def note_start(run_dir: str, rank_zero_first: RankZeroFirst) -> None:
    """Note the start on rank 0, and tell each host's launcher if it is one too many; collective.

    Args:
        run_dir: exists, and is this job's alone.
        rank_zero_first: entered.
    """
    noted = rank_zero_first.told("note this start", lambda: _note_and_count(Path(run_dir)))
    if launcher.local_rank() != 0:
        return
    step, count = map(int, noted.split())
    is_one_too_many = count >= MOST_FROM_ONE_STEP
    launcher.tell_start(
        f"not to be started again by itself: this was start {count} from step {step}, and no "
        f"checkpoint has been saved since ({run_dir}/{_FILE} lists the starts). See what ends it, "
        "or save more often (`--checkpoint.save_interval`), and start it by hand"
        if is_one_too_many
        else ""
    )


class AdvanceHook(Hook):
    """Tells the launcher of this host when the run has saved a checkpoint.

    Args:
        checkpoints: the hook that saves.
    """

    def __init__(self, checkpoints: CheckpointHook) -> None:
        self._checkpoints, self._has_advanced = checkpoints, False

    def after_record(self, step: StepRecord) -> None:
        """Tell it, once."""
        if self._checkpoints.saved is not None and not self._has_advanced:
            self._has_advanced = True
            if launcher.local_rank() == 0:
                launcher.tell_start()


def _note_and_count(run_dir: Path) -> str:
    """Write down this start; return the step that it begins after, and the starts from there."""
    complete = complete_checkpoints(run_dir)
    start = {
        "time": round(time.time(), 3),
        "step": step_of(complete[-1]) if complete else 0,
        "job": launcher.scheduler_job(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "processes": launcher.world_size(),
    }
    path, count = run_dir / _FILE, 1
    try:
        for before in reversed(_starts(path)):
            if any(before.get(name) != start[name] for name in ("step", "job")):
                break
            count += 1
        with path.open("a") as file:
            file.write(json.dumps(start) + "\n")
    except OSError as error:
        logger.warning("%s cannot be read or written: %s", path, error.strerror)
    return f"{start['step']} {count}"


def _starts(path: Path) -> list[dict[str, Any]]:
    return [line.record for line in lines(path) if line.record] if path.exists() else []
