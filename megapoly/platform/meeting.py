"""The start of a job of several processes: all join the key-value store of rank 0.

``torch.distributed.rendezvous`` does the same in one blocking call; here every reason why
processes do not meet has a sentence, and a limit of its own: hosts of a cluster may start minutes
apart, while a collective that waits for minutes has failed.
"""

from __future__ import annotations

import datetime
import itertools
import logging
import os
import socket
import threading
import time
from collections.abc import Callable

import torch.distributed as dist

from megapoly.errors import PeerError
from megapoly.platform import launcher

logger = logging.getLogger(__name__)

_PAUSE_S = 0.1
_NOTE_EVERY_S = 30.0
_meetings = itertools.count()


def join() -> dist.Store:
    """Return the job's store after all its processes have joined it.

    Processes may do so several times, all of them equally often: under a launcher the store lives
    on from one to the next, and each has keys of its own.

    The environment is that of ``env://``: RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT. Under
    torchrun the launcher of the first host serves the store, otherwise rank 0 does.

    Raises:
        LaunchError: a variable is not set or cannot be used.
        PeerError: rank 0's host cannot be found or reached, its port is in use, or processes are
            missing, for longer than ``MEGAPOLY_JOIN_TIMEOUT_S``.
    """
    launcher.check(with_address=True)
    limit_s = launcher.join_timeout_s()
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    rank, world_size = launcher.rank(), launcher.world_size()
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    wait_for_name(host, "MASTER_ADDR", limit_s)
    if not serves:
        wait_for_server(host, port, "rank 0", "MASTER_ADDR", limit_s)
    where = f"MASTER_ADDR:MASTER_PORT ({host}:{port})"
    served = open_store(host, port, where, serves=serves, limit_s=limit_s)
    # torchrun may start processes again that failed, with the same store.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"meeting/{attempt}/{next(_meetings)}", served)
    _wait_for_ranks(store, rank, world_size, limit_s)
    return store


def open_store(host: str, port: int, where: str, *, serves: bool, limit_s: float) -> dist.Store:
    """Return the key-value store at an address; a thread opens it, for another program may hang it.

    Args:
        host: name or address.
        port: its port.
        where: both, as messages name them.
        serves: whether this process serves the store.
        limit_s: longest wait.

    Raises:
        PeerError: the port is in use, or what answers is no store.
    """
    timeout = datetime.timedelta(seconds=limit_s)
    result: list[dist.Store | dist.DistNetworkError] = []

    def open_store() -> None:
        try:
            store = dist.TCPStore(
                host,
                port,
                None,
                is_master=serves,
                timeout=timeout,
                wait_for_workers=False,
                multi_tenant=True,
            )
            result.append(store)
        except dist.DistNetworkError as error:
            result.append(error)

    thread = threading.Thread(target=open_store, daemon=True)
    thread.start()
    thread.join(limit_s + 1.0)
    found = result[0] if result else None
    if found is None or isinstance(found, dist.DistNetworkError) and "Ping" in str(found):
        raise PeerError(
            f"the program that answers at {where} is not the store of this job; choose another "
            "port, the same on all hosts of the job"
        )
    if isinstance(found, dist.DistNetworkError):
        if "EADDRINUSE" in str(found):
            raise PeerError(port_in_use(where, port)) from found
        raise PeerError(f"cannot join the job at {where}: {str(found).splitlines()[0]}") from found
    return found


def wait_for_name(host: str, what: str, limit_s: float) -> None:
    """Wait until a host's name has an address; a cluster may publish it late.

    Args:
        host: name or address.
        what: the option or variable that has it.
        limit_s: longest wait.

    Raises:
        PeerError: it has none in time.
    """

    def has_address() -> bool:
        try:
            return bool(socket.getaddrinfo(host, None))
        except (OSError, UnicodeError):
            return False

    waits_for = f"the name of the host `{what}` ({host}) to resolve"
    if not wait(has_address, waits_for, limit_s, note_after_s=0.0):
        raise PeerError(
            f"`{what}` ({host}) is a name that does not resolve on this host, after "
            f"{limit_s:g} s; give a name or an address that does"
        )


def port_in_use(where: str, port: int) -> str:
    """Return the message about a port that another program of this host has."""
    return (
        f"the port {port} of {where} is in use on this host, by another job or program; choose "
        "another port, the same on all hosts of the job"
    )


def wait_for_server(host: str, port: int, who: str, what: str, limit_s: float) -> None:
    """Wait until a program answers at an address.

    Args:
        host: name or address.
        port: its port.
        who: the process that opens the port, as in "waited for WHO".
        what: the option or variable that has the address.
        limit_s: longest wait.

    Raises:
        PeerError: none does in time.
    """
    where = f"{host}:{port}"
    if not wait(lambda: answers(host, port), f"{who} at {where}", limit_s):
        raise PeerError(
            f"waited {limit_s:.0f} s for {who} at {where}, and no program answers there; see why "
            f"it did not start, or correct `{what}` and the port. {launcher.JOIN_TIMEOUT} is the "
            "limit"
        )


def answers(host: str, port: int) -> bool:
    """Return whether a program accepts a connection at an address."""
    try:
        socket.create_connection((host, port), timeout=5.0).close()
    except OSError:
        return False
    return True


def wait_for_all(
    store: dist.Store,
    number: int,
    count: int,
    each: str,
    limit_s: float,
    *,
    note_after_s: float = _NOTE_EVERY_S,
) -> str:
    """Join, and wait until all ``count`` processes have; return the numbers of those that have not.

    Args:
        store: has keys of this meeting alone.
        number: of this process, from 0.
        count: processes.
        each: what a process is, ``rank`` or ``host``.
        limit_s: longest wait.
        note_after_s: until the first line.

    Raises:
        dist.DistNetworkError: the process that serves the store has ended.
    """
    store.set(f"joined/{number}", "")
    store.add("joined", 1)

    def missing() -> str:
        absent = [r for r in range(count) if not store.check([f"joined/{r}"])]
        shown = ", ".join(map(str, absent[:8]))
        return f"{shown} and {len(absent) - 8} more" if len(absent) > 8 else shown

    met = wait(
        lambda: store.add("joined", 0) >= count,
        lambda: f"{each} {missing()} of {count}",
        limit_s,
        note_after_s=note_after_s,
    )
    return "" if met else missing()


def _wait_for_ranks(store: dist.Store, rank: int, world_size: int, limit_s: float) -> None:
    try:
        if not (absent := wait_for_all(store, rank, world_size, "rank", limit_s)):
            return
    except dist.DistNetworkError as error:
        raise PeerError(
            f"rank {rank} waited for the other processes, and the process that serves the job's "
            "store ended; see that process's own message for the reason"
        ) from error
    raise PeerError(
        f"rank {rank} waited {limit_s:g} s for the {world_size} processes of WORLD_SIZE, and rank "
        f"{absent} did not join; see why they did not start, or correct WORLD_SIZE. "
        f"{launcher.JOIN_TIMEOUT} is the limit"
    )


def wait(
    is_done: Callable[[], bool],
    for_what: str | Callable[[], str],
    limit_s: float,
    *,
    note_after_s: float = _NOTE_EVERY_S,
) -> bool:
    """Wait at most ``limit_s`` seconds, with a line now and then; return whether it is done.

    Args:
        is_done: asked again and again.
        for_what: as in "waits for WHAT".
        limit_s: longest wait.
        note_after_s: until the first line.
    """
    begin, until = time.monotonic(), time.strftime("%T", time.localtime(time.time() + limit_s))
    next_note_s = note_after_s
    while not is_done():
        waited = time.monotonic() - begin
        if waited >= limit_s:
            return False
        if waited >= next_note_s and launcher.local_rank() in (0, 1):
            what = for_what if isinstance(for_what, str) else for_what()
            logger.warning(
                "waits for %s: %.0f s, at most %.0f s, until %s", what, waited, limit_s, until
            )
            next_note_s = waited + _NOTE_EVERY_S
        time.sleep(_PAUSE_S)
    return True
