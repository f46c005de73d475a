"""Time that a rank waits for others in collectives.

In synchronous training all ranks take the same time for a step. What distinguishes a slow one is
that it does not wait: the others wait for it. Whatever the layout, a rank waits in
``torch.distributed.Work.wait``, which torch's own functions and the engine call: for gradients, for
its tensor-parallel peers, and for the previous or next pipeline stage.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist

from megapoly.training.watchdog import heartbeat


class Waiting:
    """Context in which the time of :meth:`torch.distributed.Work.wait` is measured.

    On CPU the process waits; on CUDA its stream does, between two events around the call. The time
    includes that of the transfer itself.

    Args:
        is_cuda: whether the device is a GPU.
    """

    def __init__(self, *, is_cuda: bool) -> None:
        self._is_cuda = is_cuda
        self._is_measured = False
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._wait: Any = None

    def __enter__(self) -> Waiting:
        self._wait = wait = dist.Work.wait

        def measured(work: dist.Work, *args: Any, **kwargs: Any) -> Any:
            return self._measured(wait, work, *args, **kwargs)

        dist.Work.wait = measured  # type: ignore[assignment, method-assign]
        return self

    def __exit__(self, *exc_info: Any) -> None:
        dist.Work.wait = self._wait  # type: ignore[method-assign]

    def begin(self) -> None:
        """Measure from here on."""
        self._is_measured, self._seconds = True, 0.0
        self._events.clear()

    def end(self) -> float:
        """Return the seconds since :meth:`begin`; the device must have finished its work."""
        self._is_measured = False
        return self._seconds + sum(a.elapsed_time(b) for a, b in self._events) / 1e3

    def _measured(self, wait: Any, work: dist.Work, *args: Any, **kwargs: Any) -> Any:
        if self._is_cuda:
            if not self._is_measured:
                return wait(work, *args, **kwargs)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            result = wait(work, *args, **kwargs)
            end.record()
            self._events.append((begin, end))
            return result
        start = time.perf_counter()
        heartbeat.waits(True)
        try:
            return wait(work, *args, **kwargs)
        finally:
            heartbeat.waits(False)
            self._seconds += time.perf_counter() - start
