"""Processes that end with the process that started them, also when that one is killed."""

from __future__ import annotations

import ctypes
import functools
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1  # in linux/prctl.h
# Loaded here: between fork and exec a process should call as little as possible.
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def die_with_parent(parent: int | None = None) -> None:
    """Let the kernel kill this process when its parent ends, however it ends (``prctl(2)``).

    Call it first in the main thread of the new process. The process must be started by a thread
    that lives as long as its parent does, such as the main thread: the kernel sends the signal when
    that *thread* ends. A process of multiprocessing's fork server ends with the server, which ends
    with the process that started it.

    On other systems than Linux it has no effect except for a parent that has ended already.

    Args:
        parent: process id of the parent, which it has put down before it started this process. With
            it a parent that ended before this call is noticed. A process of :mod:`multiprocessing`
            may leave it out.
    """
    if _LIBC is not None and _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if _parent_is_gone(parent):
        os.kill(os.getpid(), signal.SIGKILL)


def dying_with_this_process() -> Callable[[], None]:
    """Return the ``preexec_fn`` of a :class:`subprocess.Popen` whose process ends with this one.

    The signal stays set when the new process executes its program.
    """
    return functools.partial(die_with_parent, os.getpid())


def _parent_is_gone(parent: int | None) -> bool:
    if parent is not None:
        return os.getppid() != parent
    started_by = multiprocessing.parent_process()
    return started_by is not None and not started_by.is_alive()
