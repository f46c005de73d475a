"""What a watcher finds out about its rank: processes, stacks, collectives. From ``/proc``."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

STACK_SIGNAL = signal.SIGUSR1
# Longest wait for the stacks of one process; a busy machine may take seconds.
_STACK_S = 10.0
_PAUSE_S = 0.05
_FRAME = re.compile(r'  File "(.+)", line (\d+) in (.+)')
# A rank whose main thread is in one of these waits for another one.
_WAITING = (
    "/torch/distributed/",
    "/megatron/core/pipeline_parallel/p2p_communication.py",
    "/megapoly/training/rank_zero_first.py",
    "/megapoly/platform/meeting.py",
)
# The name that torch's DataLoader gives to its workers; the kernel keeps 15 letters.
DATA_WORKER = "pt_data_worker"
STOPPED = "T"  # by SIGSTOP or a terminal, in /proc/PID/stat; "t": by a debugger


@dataclass(frozen=True)
class Process:
    """A process that belongs to a rank.

    Args:
        pid: its number.
        name: of the program or the thread.
        state: letter of ``/proc/PID/stat``.
    """

    pid: int
    name: str
    state: str


@dataclass(frozen=True)
class Group:
    """A process group of a rank, from torch's flight recorder.

    Args:
        members: its ranks.
        name: what the group is for.
        reached: number of the last collective that this rank has begun.
        waits_in: the collective that it has begun and that has not ended; "" if none.
    """

    members: list[int]
    name: str
    reached: int
    waits_in: str = ""


@dataclass(frozen=True)
class Report:
    """What the watcher of a rank reports.

    Args:
        rank: its number.
        host: its host.
        pid: its process.
        phase: what it does.
        step: that it trains; 0 before the first.
        silent_s: seconds since it advanced.
        limit_s: seconds that it may be silent.
        state: letter of ``/proc/PID/stat``.
        is_in_wait: whether it says that it waits for others.
        frames: of the main thread, innermost first: file, line and function.
        workers: processes that it has started.
        groups: by the names of the flight recorder; None: it did not answer.
    """

    rank: int
    host: str
    pid: int
    phase: str
    step: int
    silent_s: float
    limit_s: float
    state: str
    is_in_wait: bool = False
    frames: list[tuple[str, int, str]] = field(default_factory=list)
    workers: list[Process] = field(default_factory=list)
    groups: dict[str, Group] | None = None

    @property
    def is_stopped(self) -> bool:
        """Whether a signal or a debugger has stopped the process."""
        return self.state.upper() == STOPPED

    @property
    def is_debugged(self) -> bool:
        """Whether a person looks at it with a debugger."""
        return self.state == "t" or any(file.endswith("/pdb.py") for file, _, _ in self.frames)

    @property
    def waits(self) -> bool:
        """Whether it waits for another rank."""
        pending = any(group.waits_in for group in (self.groups or {}).values())
        in_python = any(part in file for file, _, _ in self.frames for part in _WAITING)
        return self.is_in_wait or pending or in_python

    @property
    def waits_in(self) -> str:
        """What it waits in: a collective with its group, or a function; "" if in nothing."""
        for group in (self.groups or {}).values():
            if group.waits_in:
                return f"{group.waits_in} of {group.name}"
        for file, _, function in self.frames:
            if any(part in file for part in _WAITING) and not function.startswith("_"):
                return function
        return ""

    @property
    def place(self) -> str:
        """The innermost function of this project, or of all, as ``file:line in function``."""
        frames = [frame for frame in self.frames if not frame[0].endswith("/training/waiting.py")]
        ours = [frame for frame in frames if "/megapoly/" in frame[0]]
        for file, line, function in ours or frames:
            parts = Path(file).parts
            start = max((i for i, part in enumerate(parts) if part == "megapoly"), default=-2)
            return f"{'/'.join(parts[start:])}:{line} in {function}"
        return ""

    def to_json(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Report:
        """Return the report that :meth:`to_json` was called on."""
        groups = values["groups"]
        return cls(
            **{
                **values,
                "frames": [tuple(frame) for frame in values["frames"]],
                "workers": [Process(**worker) for worker in values["workers"]],
                "groups": groups and {name: Group(**group) for name, group in groups.items()},
            }
        )


def process(pid: int) -> Process | None:
    """Return a process; None if it has ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    before, _, after = text.rpartition(")")
    return Process(pid, before.partition("(")[2], after.split()[0])


def descendants(pid: int) -> list[Process]:
    """Return the processes that a process has started, and theirs, without this one."""
    found = []
    for child in _children(pid):
        if child != os.getpid() and (its := process(child)) is not None:
            found += [its, *descendants(child)]
    return found


def _children(pid: int) -> Iterator[int]:
    for task in sorted(Path("/proc", str(pid), "task").glob("*")):
        with contextlib.suppress(OSError):  # a thread that has ended
            yield from map(int, (task / "children").read_text().split())


def bytes_moved(pid: int) -> int:
    """Return the bytes that a process and its children have read from files and written."""
    total = 0
    for each in (pid, *(child.pid for child in descendants(pid))):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{each}/io").read_text().splitlines():
                if line.startswith(("rchar:", "wchar:")):
                    total += int(line.split()[1])
    return total


def stacks(pid: int, file: int) -> str:
    """Return the stacks of all threads of a process, "" if it does not write them.

    Args:
        pid: of a process that has registered :mod:`faulthandler` for :data:`STACK_SIGNAL`.
        file: descriptor of the file that it writes to.
    """
    its = process(pid)
    if its is None or its.state.upper() == STOPPED or not _handles(pid, STACK_SIGNAL):
        return ""
    begin = size = os.fstat(file).st_size
    try:
        os.kill(pid, STACK_SIGNAL)
    except ProcessLookupError:
        return ""
    for _ in range(int(_STACK_S / _PAUSE_S)):
        time.sleep(_PAUSE_S)
        before, size = size, os.fstat(file).st_size
        if size == before > begin:
            break
    return os.pread(file, size - begin, begin).decode(errors="replace")


def _handles(pid: int, number: int) -> bool:
    """Return whether a process handles a signal, which would end it otherwise."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("SigCgt:"):
            return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


def main_thread(text: str) -> list[tuple[str, int, str]]:
    """Return file, line and function of the frames of the thread that got the signal.

    The kernel gives a signal of a process to its main thread, unless that blocks it.

    Args:
        text: that faulthandler wrote.
    """
    frames: list[tuple[str, int, str]] = []
    _, _, current = text.partition("Current thread ")
    for line in current.splitlines()[1:]:
        match = _FRAME.fullmatch(line)
        if match is None:
            break
        frames.append((match[1], int(match[2]), match[3]))
    return frames


def groups_of(record: Mapping[str, Any], members: Mapping[str, Sequence[int]]) -> dict[str, Group]:
    """Return where a rank is in its process groups.

    NCCL reports the start of a collective on the device. Gloo reports none: there a collective has
    begun when it was called, and `retired` says that it has ended.

    Args:
        record: of torch's flight recorder.
        members: ranks of each group.
    """
    groups: dict[str, Group] = {}
    for entry in record.get("entries", []):
        key, name = entry["process_group"]
        if key not in members:
            continue
        operation = entry["profiling_name"]
        is_over = entry["retired"] or entry["state"] == "completed"
        has_begun = is_over or entry["state"] == "started" or operation.startswith("gloo:")
        known = groups.get(key, Group(list(members[key]), name, 0))
        # Sends and receives are of two ranks, and have no number that all share.
        number = 0 if entry["is_p2p"] else entry["collective_seq_id"]
        waits_in = known.waits_in
        if not is_over and not waits_in:
            waits_in = operation.partition(":")[2] + (f" #{number}" if number else "")
        reached = max(known.reached, number if has_begun else 0)
        groups[key] = Group(known.members, name, reached, waits_in)
    return groups
