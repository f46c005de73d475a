"""The processes of an evaluation, before its process groups exist: they choose the checkpoint.

Groups need the configuration of the checkpoint, so its files are verified before.
"""

from __future__ import annotations

import itertools
import json
import time
from typing import Any

import torch.distributed as dist

from megapoly.checkpoints.verify import Ranks
from megapoly.errors import PeerError
from megapoly.platform import launcher
from megapoly.platform.meeting import join
from megapoly.training.rank_zero_first import wait_for_peers

_PAUSE_S = 0.01
_LIMIT_S = 3600.0
_FAREWELL_S = 10.0


class MeetingRanks:
    """Processes that a launcher started, which exchange values through the job's store.

    The store must exist until the process groups do: rank 0 may serve it.
    """

    def __init__(self) -> None:
        self._store = dist.PrefixStore("choose", join())
        self._rank, self._num_ranks = launcher.rank(), launcher.world_size()
        self._numbers = itertools.count()

    def ranks(self) -> Ranks:
        """Return the processes, for :func:`megapoly.checkpoints.verify.verify`."""
        return Ranks(self._rank, self._num_ranks, self._gather)

    def _gather(self, own: Any) -> list[Any]:
        number = next(self._numbers)
        keys = [f"{number}/{rank}" for rank in range(self._num_ranks)]
        self._store.set(keys[self._rank], json.dumps(own))
        deadline = time.monotonic() + _LIMIT_S
        while not self._store.check(keys):
            if time.monotonic() > deadline:
                raise PeerError(
                    f"rank {self._rank} waited {_LIMIT_S:g} s for the other ranks to verify the "
                    "checkpoint; see why they did not"
                )
            time.sleep(_PAUSE_S)
        gathered = [json.loads(self._store.get(key)) for key in keys]
        # Rank 0 serves the store, and ends if it finds no checkpoint: not before all have read.
        if self._rank == 0:
            wait_for_peers(self._store, f"{number}/read", self._num_ranks, timeout_s=_FAREWELL_S)
        else:
            self._store.add(f"{number}/read", 1)
        return gathered
