"""The time that a rank waits for others: at least the time that another one makes it wait."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from megapoly.testing import run_on_ranks
from megapoly.training.waiting import Waiting
from megapoly.training.watchdog import heartbeat

LATE_S = 0.2


def _waited(num_collectives: int) -> list[float]:
    """Return the measured times; in each collective rank 1 is 0.2 s late."""
    dist.init_process_group("gloo")
    rank, original = dist.get_rank(), dist.Work.wait
    store = dist.distributed_c10d._get_default_store()
    number = 0

    def announce(waits: bool) -> None:
        if waits:
            store.set(f"rank {rank} waits in {number}", "")

    heartbeat.waits = announce
    waiting, times = Waiting(is_cuda=False), []
    with waiting:
        for number, collective in enumerate((_reduce, dist.barrier, _exchange)[:num_collectives]):
            waiting.begin()
            if rank == 1:
                store.get(f"rank 0 waits in {number}")  # from then on, however busy the machine is
                time.sleep(LATE_S)
            collective()
            times.append(waiting.end())
    assert dist.Work.wait is original
    dist.destroy_process_group()
    return times


def _reduce() -> None:
    dist.all_reduce(torch.ones(1))


def _exchange() -> None:
    peer = 1 - dist.get_rank()
    ops = [dist.P2POp(dist.isend, torch.ones(1), peer), dist.P2POp(dist.irecv, torch.ones(1), peer)]
    for work in dist.batch_isend_irecv(ops):
        work.wait()


def test_a_rank_waits_as_long_as_another_one_is_late() -> None:
    first, second = run_on_ranks(_waited, 2, 3)
    assert len(first) == len(second) == 3
    assert min(first) >= LATE_S
    assert min(second) > 0.0
