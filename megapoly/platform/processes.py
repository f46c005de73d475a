"""How processes end: with the process that started them, also when that one is killed."""

from __future__ import annotations

import ctypes
import functools
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections.abc import Callable

# What asks a job to stop: Ctrl-C, a scheduler, a closed terminal.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_PR_SET_PDEATHSIG = 1  # in linux/prctl.h
# Loaded here: between fork and exec a process should call as little as possible.
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def die_with_parent(parent: int | None = None) -> None:
    """Let the kernel kill this process when its parent ends, however it ends (``prctl(2)``).

    Call it first in the main thread of the new process. The process must be started by a thread
    that lives as long as its parent does, such as the main thread: the kernel sends the signal when
    that *thread* ends. For a process of multiprocessing's fork server, whose parent is the server,
    a thread waits for the end of the process that asked for it.

    On other systems than Linux only the thread and the check of ``parent`` have an effect.

    Args:
        parent: process id of the parent, which it has put down before it started this process. With
            it a parent that ended before this call is noticed. A process of :mod:`multiprocessing`
            leaves it out.
    """
    if _LIBC is not None and _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    asked_by = multiprocessing.parent_process()
    if parent is not None:
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
    elif asked_by is not None and asked_by.pid != os.getppid():  # or it has ended already
        threading.Thread(target=_die_with, args=(asked_by.sentinel,), daemon=True).start()


def dying_with_this_process() -> Callable[[], None]:
    """Return the ``preexec_fn`` of a :class:`subprocess.Popen` whose process ends with this one.

    The signal stays set when the new process executes its program.
    """
    return functools.partial(die_with_parent, os.getpid())


def outlives_its_terminal() -> bool:
    """Return whether this process was started to ignore SIGHUP, as by ``nohup``.

    To be asked before a handler is set.
    """
    return signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def ignore_stop_signals() -> None:
    """Let :data:`STOP_SIGNALS` have no effect, in a process that is about to end by itself.

    One that arrives so late would turn the status of a job that has done its work into that of a
    killed one.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _die_with(sentinel: int) -> None:
    """End this process when the pipe that another one holds open is closed."""
    multiprocessing.connection.wait([sentinel])
    os.kill(os.getpid(), signal.SIGKILL)
