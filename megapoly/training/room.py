"""The room that checkpoints need on the disk of a run."""

from __future__ import annotations

import shutil
from collections.abc import Callable

from megatron.core.dist_checkpointing.mapping import is_main_replica

from megapoly.checkpoints.run_folder import checkpoints_folder, complete_checkpoints
from megapoly.model.builder import unwrap
from megapoly.model.shards import shards_of, tensor_entries
from megapoly.training.distributed import is_rank_zero, sum_over_all
from megapoly.training.hooks import Hook, StepRecord, is_due
from megapoly.training.state import TrainState

# A parameter's value and its two moments of Adam, in fp32; with bf16 also the value in bf16.
_BYTES_IN_FP32, _BYTES_IN_BF16 = 3 * 4, 2


def tensor_bytes(state: TrainState) -> int:
    """Return the bytes of all tensors in a checkpoint of a run; collective.

    12 bytes a parameter, 14 with ``training.bf16``; those that ranks have in common count once.
    What else a checkpoint has, about 1 KB a tensor, does not count.
    """
    shards = (
        shard
        for chunk in state.chunks
        for entry in tensor_entries(unwrap(chunk)).values()
        for shard in shards_of(entry)
    )
    own = sum(shard.data.numel() for shard in shards if is_main_replica(shard.replica_id))
    (parameters,) = sum_over_all([float(own)], state.platform)
    of_each = _BYTES_IN_FP32 + (_BYTES_IN_BF16 if state.config.training.bf16 else 0)
    return of_each * round(parameters)


class RoomHook(Hook):
    """Warns when the disk has no room for the checkpoints to come.

    Before training for all of them, and after each checkpoint for the next one: a checkpoint is
    written before older ones are deleted. A quota, or what other programs write meanwhile, is not
    known.

    Args:
        state: the run, restored.
        show: shows a line to the user.
    """

    def __init__(self, state: TrainState, show: Callable[[str], None]) -> None:
        self._state, self._show = state, show
        self._folder = checkpoints_folder(state.config.run_dir)  # may be a link to another disk
        self._bytes = tensor_bytes(state)
        if is_rank_zero():
            self._warn(self._num_to_come(), "what this run is to save")

    def after_record(self, step: StepRecord) -> None:
        """Look at the disk after a checkpoint; its own hook comes before this one."""
        if is_rank_zero() and is_due(self._state, self._state.config.checkpoint.save_interval):
            self._warn(min(1, self._num_left()), "the next checkpoint")

    def _num_left(self) -> int:
        """Return the number of checkpoints that the run is still to write."""
        interval, last = self._state.config.checkpoint.save_interval, self._state.train_iters
        left = last - self._state.iteration
        if left <= 0 or interval <= 0:
            return int(left > 0)
        return last // interval - self._state.iteration // interval + (last % interval > 0)

    def _num_to_come(self) -> int:
        """Return for how many more checkpoints there must be room at once."""
        left, keep = self._num_left(), self._state.config.checkpoint.keep
        have = len(complete_checkpoints(self._state.config.run_dir))
        return min(left, max(1, keep + 1 - have)) if keep else left

    def _warn(self, count: int, what: str) -> None:
        needed = count * self._bytes
        try:
            free = shutil.disk_usage(self._folder).free
        except OSError:
            return  # the disk is out of reach, as the next save will say
        if needed > free:
            self._show(
                f"warning: {what} needs about {needed:,} bytes and {free:,} are free in "
                f"{self._folder}; make room, or lower `checkpoint.keep` "
                f"({self._state.config.checkpoint.keep})"
            )
