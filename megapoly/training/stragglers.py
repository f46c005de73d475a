"""Ranks that are slower than the others."""

from __future__ import annotations

import socket
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megapoly.training.hooks import Hook, StepRecord
from megapoly.training.profiling import disturbed_steps
from megapoly.training.state import TrainState
from megapoly.training.throughput import WARM_UP_STEPS
from megapoly.training.waiting import Waiting

NUM_STEPS = 50
THRESHOLD = 1.3
# On CUDA two events for each collective cost the host some microseconds: not in every step.
_EVERY_ON_CUDA = 5


@dataclass(frozen=True)
class Straggler:
    """A rank that is slower than its peers.

    Args:
        rank: its number.
        busy_s: seconds of a step in which it does not wait, a mean.
        median_s: the median of its peers' seconds.
        peers: what these have in common.
    """

    rank: int
    busy_s: float
    median_s: float
    peers: str

    def __str__(self) -> str:
        return (
            f"rank {self.rank} is slow: {1e3 * self.busy_s:.1f} ms of a step without waiting, "
            f"{self.busy_s / self.median_s:.2f} times the median of {self.peers} "
            f"({1e3 * self.median_s:.1f} ms)"
        )


def slowest(busy_s: Sequence[float], stages: Sequence[int]) -> Straggler:
    """Return the rank that is slowest in comparison with its peers.

    These are the other ranks of its pipeline stage, whose work is the same; where a stage is one
    rank, all other ranks.

    Args:
        busy_s: seconds of a step in which rank i does not wait, for at least two ranks.
        stages: pipeline stage of rank i.
    """
    found = []
    for rank, (seconds, stage) in enumerate(zip(busy_s, stages, strict=True)):
        others = [i for i in range(len(busy_s)) if i != rank]
        same = [i for i in others if stages[i] == stage]
        peers = "the other ranks" + (f" of pipeline stage {stage}" if max(stages) else "")
        if not same:
            peers = "the other pipeline stages"
        median = statistics.median(busy_s[i] for i in same or others)
        found.append(Straggler(rank, seconds, median, peers))
    return max(found, key=lambda each: each.busy_s / max(each.median_s, 1e-9))


class StragglerHook(Hook):
    """Names the slowest rank every 50 steps, if it is 30 % slower than its peers.

    Adds ``ranks/slowest`` and ``ranks/slowest_over_median`` to the details of these steps. The
    first steps of a process and those that a profiler disturbs are not counted.

    Args:
        state: the run.
        show: shows a line to the user.
    """

    def __init__(self, state: TrainState, show: Callable[[str], None]) -> None:
        self._state, self._show = state, show
        self._waiting = Waiting(is_cuda=state.platform.is_cuda).__enter__()
        self._every = _EVERY_ON_CUDA if state.platform.is_cuda else 1
        self._disturbed = disturbed_steps(state.config)
        self._num_steps = -WARM_UP_STEPS
        self._busy_s: list[float] = []

    def before_step(self) -> None:
        """Measure the waiting of a step."""
        if self._num_steps >= 0 and self._num_steps % self._every == 0:
            self._waiting.begin()

    def after_step(self, step: StepRecord) -> None:
        """Count a step; compare the ranks when it is time; collective then."""
        if self._num_steps >= 0 and self._num_steps % self._every == 0:
            waited_s = self._waiting.end()
            if self._state.iteration not in self._disturbed:
                self._busy_s.append(max(0.0, step.step_time_s - waited_s))
        self._num_steps += 1
        if self._num_steps > 0 and self._num_steps % NUM_STEPS == 0 and self._busy_s:
            self._compare(step)
            self._busy_s.clear()

    def close(self) -> None:
        """Measure no longer."""
        self._waiting.__exit__()

    def _compare(self, step: StepRecord) -> None:
        stage = parallel_state.get_pipeline_model_parallel_rank()
        mine = [statistics.fmean(self._busy_s), float(stage)]
        values = torch.tensor(mine, dtype=torch.float64, device=self._state.platform.device)
        gathered = [torch.empty_like(values) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, values)
        busy_s, stages = zip(*(each.tolist() for each in gathered), strict=True)
        found = slowest(busy_s, [int(each) for each in stages])
        ratio = found.busy_s / max(found.median_s, 1e-9)
        step.details |= {"ranks/slowest": float(found.rank), "ranks/slowest_over_median": ratio}
        if ratio > THRESHOLD:
            host = [socket.gethostname()]
            dist.broadcast_object_list(host, src=found.rank, device=self._state.platform.device)
            self._show(f"{found}, over {NUM_STEPS} steps; it runs on {host[0]}")
