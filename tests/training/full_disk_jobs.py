"""Jobs whose disk takes nothing for a while."""

from __future__ import annotations

import contextlib
import io
import resource
import signal

import torch.distributed as dist

from megapoly.config.recipes import FOLDER as RECIPES
from megapoly.errors import CheckpointError
from megapoly.pretrain import configure, pretrain
from megapoly.training import room
from megapoly.training.save_checkpoint import CheckpointSaver


def job_with_full_disk(
    argv: list[str], ranks: list[int], steps: list[int]
) -> tuple[str, str | None]:
    """Run a job in which some ranks cannot write when the checkpoints of some steps are saved.

    Returns:
        What the rank printed, and the error with which it ended.
    """
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    save = CheckpointSaver.save

    def save_on_a_full_disk(self, *, in_background):
        is_full = self._state.iteration in steps and dist.get_rank() in ranks
        with files_at_most(100 if is_full else resource.RLIM_INFINITY):
            return save(self, in_background=in_background)

    CheckpointSaver.save = save_on_a_full_disk  # in this process alone, which ends with the job
    printed, error = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        try:
            _pretrain(argv)
        except CheckpointError as found:
            error = str(found)
    return printed.getvalue(), error


def job_that_estimates_its_checkpoints(argv: list[str]) -> int:
    """Run a job and return the bytes that its checkpoints are estimated to have."""
    noted, estimate = [], room.tensor_bytes

    def noting(state):
        noted.append(estimate(state))
        return noted[0]

    room.tensor_bytes = noting  # in this process alone
    _pretrain(argv)
    return noted[0]


@contextlib.contextmanager
def files_at_most(num_bytes: int):
    """Limit the size to which files of this process can grow."""
    previous = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, previous[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, previous)


def _pretrain(argv: list[str]) -> None:
    pretrain(configure(argv, default_recipe=RECIPES / "dense_tiny.yaml", program="pretrain"))
