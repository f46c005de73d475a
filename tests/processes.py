"""Processes that tests start: waited for without a time limit of their own, ended with the test.

A machine can be arbitrarily busy, so no wait here has a limit in seconds. pytest's ``timeout`` in
``pyproject.toml`` ends a test that hangs, and :func:`end_new_children` what it has started.
"""

from __future__ import annotations

import contextlib
import ctypes
import fnmatch
import multiprocessing
import os
import signal
import subprocess
import time
import weakref
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest

_SET_CHILD_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER in linux/prctl.h
# Started once for all tests of a session, by the standard library and by torch.compile.
_SHARED = ("multiprocessing.resource_tracker", "multiprocessing.forkserver", "compile_worker")
_started: weakref.WeakSet[subprocess.Popen[Any]] = weakref.WeakSet()
_kept: set[int] = set()


def follow_processes() -> None:
    """Note every :class:`subprocess.Popen` of this process, and adopt orphans of its children."""
    ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    start = subprocess.Popen.__init__

    def start_and_note(self: subprocess.Popen[Any], *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        _started.add(self)

    subprocess.Popen.__init__ = start_and_note  # type: ignore[method-assign]


def children() -> set[int]:
    """Return the ids of this process's children, without those that all tests share."""
    pids: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a thread that has ended
            pids.update(map(int, (task / "children").read_text().split()))
    pids -= _kept
    return {pid for pid in pids if not any(name in _command(pid) for name in _SHARED)}


def keep(process: subprocess.Popen[Any], yes: bool = True) -> None:
    """Let a process outlive the test that starts it: a fixture of several tests ends it."""
    (_kept.add if yes else _kept.discard)(process.pid)


def end_new_children(before: Collection[int]) -> list[str]:
    """Kill the children that are not among ``before``, and theirs; close their pipes.

    Returns:
        Commands of :class:`subprocess.Popen` objects that were still running.
    """
    multiprocessing.active_children()  # collects those that have ended
    unfinished = {each.pid: each for each in list(_started) if each.returncode is None}
    running = []
    while new := children() - set(before):
        for pid in new:
            if pid in unfinished and unfinished[pid].poll() is None:
                running.append(_command(pid))
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in new:  # their children are then this process's, for the next turn
            if pid in unfinished:
                unfinished[pid].wait()
            else:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, 0)
    for pid, process in unfinished.items():
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None and pid not in before and pid not in _kept:
                pipe.close()
    return running


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def wait_until(condition: Callable[[], object], *processes: subprocess.Popen[Any]) -> None:
    """Wait until a condition holds; fail with the output of a process that ends before."""
    while not condition():
        for process in processes:
            if process.poll() is not None and not condition():
                output = "\n".join(str(text) for text in process.communicate() if text)
                pytest.fail(f"ended with status {process.returncode} before: {output}")
        time.sleep(0.01)


def names(folder: Path, pattern: str) -> list[str]:
    """Return the names in a folder that match, none where it does not exist (any more).

    Unlike :meth:`pathlib.Path.glob`, which looks into each entry, it may be called while another
    process creates, renames and removes them.
    """
    try:
        return sorted(fnmatch.filter(os.listdir(folder), pattern))
    except FileNotFoundError:
        return []


def num_lines(file: Path) -> int:
    """Return the number of whole lines that a file has so far, 0 where it does not exist."""
    try:
        return file.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0
