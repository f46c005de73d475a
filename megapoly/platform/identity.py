"""Which process that is: its number is given again, its start and its machine's start are not."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_NAMESPACE = "/proc/self/ns/pid"


@dataclass(frozen=True)
class ProcessIdentity:
    """A process of Linux.

    Args:
        pid: its number.
        start_ticks: clock ticks from the start of its machine to its own.
        boot_id: of the start of its machine.
        pid_namespace: in which it has this number; a container has its own.
    """

    pid: int
    start_ticks: int
    boot_id: str
    pid_namespace: str


def own_identity() -> ProcessIdentity | None:
    """Return the identity of this process; None where the system does not tell, as without /proc.

    A process that was forked has another one.
    """
    pid = os.getpid()
    stat, boot_id = _stat(pid), current_boot()
    with contextlib.suppress(OSError):
        if stat is not None and boot_id:
            return ProcessIdentity(pid, stat[1], boot_id, os.readlink(_NAMESPACE))
    return None


def is_gone(process: ProcessIdentity) -> bool | None:
    """Return whether a process has ended; None if it cannot be seen from here.

    It cannot on another machine, after a restart of this one, from another container, and by
    another user where /proc hides processes (its option ``hidepid``).
    """
    here = own_identity()
    if here is None or here.boot_id != process.boot_id:
        return None
    if here.pid_namespace != process.pid_namespace:
        return None
    stat = _stat(process.pid)
    if stat is None and _exists(process.pid):
        return None
    return stat is None or stat[0] in "ZX" or stat[1] != process.start_ticks


def current_boot() -> str:
    """Return the id of this machine's start, "" if it is not known."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _stat(pid: int) -> tuple[str, int] | None:
    """Return the state and start of a process; None if there is none of this number."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # its name may have spaces and brackets
    return fields[0], int(fields[19])
