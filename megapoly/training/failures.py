"""Failures of the processes of a job: each is shown on its host, once, and the first one first."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator

import torch.distributed as dist

from megapoly.errors import MegapolyError, PeerError
from megapoly.platform import launcher

_COUNT, _FIRST = "failures shown", "first failure"
_PATIENCE_S = 5.0  # for the process that failed first, which prints before it writes to the store
_PAUSE_S = 0.01


@contextlib.contextmanager
def shown_once(store: dist.Store) -> Iterator[None]:
    """Print the error that ends this process, unless a process of its host has printed it.

    Errors that all processes find are alike, and some repeat another process's. Every other one is
    printed on whichever rank it happens, and the first before the others.

    Args:
        store: of the job; it may be gone when an error is raised.
    """
    try:
        yield
    except MegapolyError as error:
        text = str(error)
        try:
            # A PeerError repeats a failure or waited in vain: it is not the first one.
            if not isinstance(error, PeerError) and store.add(_COUNT, 1) == 1:
                if not _was_logged(store, text):
                    show(text)
                store.set(_FIRST, f"{_host()}\n{text}")
            elif not _is_known(store, text):
                show(text)
        except dist.DistError:
            show(text)
        error.is_shown = True
        raise


def show(text: str) -> None:
    """Print an error, with the rank if this is not the first process of its host."""
    where = "" if launcher.local_rank() == 0 else f"rank {launcher.rank()}: "
    print(f"{where}{text}", file=sys.stderr, flush=True)


def _host() -> int:
    """Return the rank of this host's first process."""
    return launcher.rank() - launcher.local_rank()


def _was_logged(store: dist.Store, text: str) -> bool:
    """Return whether :class:`RankZeroFirst` has logged this error, of no first process."""
    if launcher.local_rank() == 0 or not store.check(["failure"]):
        return False
    return bool(store.get("failure").decode() == f"rank {launcher.rank()}: {text}")


def _is_known(store: dist.Store, text: str) -> bool:
    """Return whether this host shows the first failure, and this one says the same."""
    deadline = time.monotonic() + _PATIENCE_S
    while not store.check([_FIRST]):
        if time.monotonic() > deadline:
            return False
        time.sleep(_PAUSE_S)
    host, _, first = store.get(_FIRST).decode().partition("\n")
    if first not in text:
        return False
    return int(host) == _host() or launcher.local_rank() != 0
