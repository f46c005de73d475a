"""Failures of the processes of a job: each is shown on its host, once, and the first one first."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
import traceback
from collections.abc import Iterator
from typing import NamedTuple

import torch.distributed as dist

from megapoly.data.loader import ended_worker
from megapoly.errors import LostPeerError, MegapolyError, PeerError
from megapoly.platform import launcher
from megapoly.platform.meeting import answers

_COUNT, _FIRST = "failures shown", "first failure"
_PATIENCE_S = 5.0  # for the process that failed first, which prints before it writes to the store
_PAUSE_S = 0.01

# What gloo (transport/tcp/pair.cc, unbound_buffer.cc) and NCCL (ncclRemoteError) say when another
# process has ended, and when it does not answer in time.
_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "remote process exited or there was a network error",
)
_LATE = ("Timed out waiting", "timed out in blocking wait", "Watchdog caught collective operation")


@contextlib.contextmanager
def shown_once(store: dist.Store) -> Iterator[None]:
    """Print the error that ends this process, unless a process of its host has printed it.

    Errors that all processes find are alike, and some repeat another process's. Every other one is
    printed on whichever rank it happens, and the first before the others. Errors that are not this
    project's are printed with their stack trace, at once: other processes fail when this one ends.
    That a data worker has ended is one sentence.

    Args:
        store: of the job; it may be gone when an error is raised.

    Raises:
        LostPeerError: in place of what a collective raises when another process has ended.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # torch's CheckpointException is no Exception
        if (what := _lost_peer(error)) is not None:
            raise _lost(store, what) from error
        if isinstance(error, MegapolyError):
            _show_once(store, error, str(error))
        elif (sentence := ended_worker(error)) is not None:
            _show_once(store, error, sentence)
        else:
            brief = "".join(traceback.format_exception_only(error)).strip()
            _show_once(store, error, brief, f"{brief}\n{traceback.format_exc()}".rstrip())
        raise


def _show_once(
    store: dist.Store, error: BaseException, text: str, long_text: str | None = None
) -> None:
    """Print an error that is this host's to print; ``text`` is what distinguishes it."""
    long_text = text if long_text is None else long_text
    try:
        # A PeerError repeats a failure or waited in vain: it is not the first one.
        if not isinstance(error, PeerError) and store.add(_COUNT, 1) == 1:
            if long_text != text or not _was_logged(store, text):
                show(long_text)
            first = (_host(), launcher.rank(), launcher.exit_status(error), text)
            store.set(_FIRST, "\n".join(map(str, first)))
        elif not _is_known(store, text):
            show(long_text)
    except dist.DistError:
        show(long_text)
    error.is_shown = True  # type: ignore[attr-defined]


def show(text: str) -> None:
    """Print an error, with the rank if this is not the first process of its host."""
    where = "" if launcher.local_rank() == 0 else f"rank {launcher.rank()}: "
    print(f"{where}{text}", file=sys.stderr, flush=True)


def _lost_peer(error: BaseException) -> str | None:
    """Return the line that says that another process ended or did not answer; None for others."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, dist.DistNetworkError):  # what served the job's store has ended
            return str(seen).partition("\n")[0]
        for part in (*_LOST, *_LATE):
            if isinstance(seen, RuntimeError) and part in str(seen):
                return next(line for line in str(seen).splitlines() if part in line)
        seen = seen.__cause__ or seen.__context__
    return None


def _lost(store: dist.Store, what: str) -> LostPeerError:
    """Return the error of a collective that another rank has left; shown once on each host.

    Args:
        store: of the job; it may be gone.
        what: that the backend says.
    """
    what = re.sub(r"^\[[^]]*\] ", "", what).partition(". This is typically")[0][:200]
    error = LostPeerError(
        "another rank ended without a message, killed or together with its host: see the status "
        f"that its launcher prints, and `dmesg` of its host for memory ({what})"
    )
    if any(part in what for part in _LATE):
        error = LostPeerError(
            "a collective waited for another rank for longer than "
            f"`parallel.distributed_timeout_minutes` allows ({what})"
        )
    is_to_show = launcher.local_rank() == 0
    with contextlib.suppress(dist.DistError):
        first = _first_failure(store) if _is_served() else None
        if first is not None:
            error = LostPeerError(f"rank {first.rank} failed: {first.text}")
            error.exit_status = first.exit_status
        is_here = first is not None and first.host == _host()
        if _is_served():
            is_to_show = not is_here and store.add(f"lost/{_host()}", 1) == 1
    if is_to_show:
        show(str(error))
    error.is_shown = True
    return error


def _is_served() -> bool:
    """Return whether the job's store answers; a request to one that is gone prints C++ frames."""
    if "MASTER_ADDR" not in os.environ:
        return True
    return answers(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))


def _host() -> int:
    """Return the rank of this host's first process."""
    return launcher.rank() - launcher.local_rank()


def _was_logged(store: dist.Store, text: str) -> bool:
    """Return whether :class:`RankZeroFirst` has logged this error, of no first process."""
    if launcher.local_rank() == 0 or not store.check(["failure"]):
        return False
    return bool(store.get("failure").decode() == f"rank {launcher.rank()}: {text}")


class _Failure(NamedTuple):
    host: int  # rank of its first process
    rank: int
    exit_status: int
    text: str


def _first_failure(store: dist.Store) -> _Failure | None:
    """Return the first failure; None if no process tells of one in time."""
    deadline = time.monotonic() + _PATIENCE_S
    while not store.check([_FIRST]):
        if time.monotonic() > deadline:
            return None
        time.sleep(_PAUSE_S)
    host, rank, status, text = store.get(_FIRST).decode().split("\n", maxsplit=3)
    return _Failure(int(host), int(rank), int(status), text)


def _is_known(store: dist.Store, text: str) -> bool:
    """Return whether this host shows the first failure, and this one says the same."""
    first = _first_failure(store)
    if first is None or first.text not in text:
        return False
    return first.host == _host() or launcher.local_rank() != 0
