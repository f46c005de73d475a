"""A rank that the launcher forks instead of starting an interpreter, which would import again."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from megapoly.platform.processes import die_with_parent

_PAUSE_S = 0.01
# What the launcher handles itself, and a new interpreter would not.
_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGCHLD)


def fork_ranks(module: str, main: Callable[[Sequence[str]], int]) -> None:
    """Let torchrun of this process fork its ranks, of a program that has been imported.

    Args:
        module: what it is told to run, after ``-m``.
        main: of that module.
    """
    from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import (
        SubprocessHandler,
    )

    def start(self: SubprocessHandler, command: Sequence[str], env: Mapping[str, str]) -> Any:
        arguments = command[command.index(module) + 1 :]
        return ForkedProcess(lambda: main(arguments), env)

    SubprocessHandler._popen = start  # type: ignore[method-assign,assignment]


class ForkedProcess:
    """What torchrun uses of :class:`subprocess.Popen`, for a fork of this process.

    Args:
        work: what it does; returns its exit status.
        env: its environment.
    """

    def __init__(self, work: Callable[[], int], env: Mapping[str, str]) -> None:
        self.returncode: int | None = None
        parent = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            run_and_exit(lambda: _work_as_rank(work, env, parent))

    def poll(self) -> int | None:
        """Return the exit status; None until the process has ended."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end of the process.

        Raises:
            subprocess.TimeoutExpired: it does not end in time.
        """
        end = None if timeout is None else time.monotonic() + timeout
        while (status := self.poll()) is None:
            if end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired("a forked rank", timeout or 0.0)
            time.sleep(_PAUSE_S)
        return status


def run_and_exit(work: Callable[[], int]) -> NoReturn:
    """Run ``work`` in a forked process, which ends with its status as an interpreter would."""
    status = 1
    try:
        status = work()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _work_as_rank(work: Callable[[], int], env: Mapping[str, str], parent: int) -> int:
    os.setsid()
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    die_with_parent(parent)
    os.environ.clear()
    os.environ.update(env)
    return work()
