"""Network interfaces that gloo and NCCL are told to use: an error of theirs becomes a sentence."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator

from megapoly.errors import LaunchError, PeerError
from megapoly.platform import launcher

_GLOO, _NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"


@contextlib.contextmanager
def explained(backend: str) -> Iterator[None]:
    """Turn errors of the creation of process groups that are about addresses into sentences.

    Args:
        backend: of torch, such as ``gloo`` or ``cuda:nccl,cpu:gloo``.

    Raises:
        LaunchError: no interface of this host is one that a variable names.
        PeerError: gloo listens where the other processes cannot reach it.
    """
    if "nccl" in backend:
        check_nccl(os.environ.get(_NCCL, ""))
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if "Unable to find address for" in text:
            raise _no_interface(_GLOO) from error
        if "connectFullMesh failed" in text:
            raise PeerError(
                "the processes met and cannot connect to each other: on this host gloo listens at "
                f"{_own_address()}. If other hosts cannot reach that, set `{_GLOO}` to the "
                f"interface that connects them, one of {_names()}; otherwise see whether another "
                "process has ended"
            ) from error
        raise


def check_nccl(value: str) -> None:
    """Check that ``NCCL_SOCKET_IFNAME`` leaves NCCL an interface of this host.

    Its value is a list of prefixes; ``=`` before it makes them names, ``^`` excludes them.

    Raises:
        LaunchError: it leaves none.
    """
    exact, excludes = value.startswith("="), value.startswith("^")
    listed = [name for name in value.lstrip("^=").split(",") if name]
    if not listed or excludes:
        return
    found = [name for _, name in socket.if_nameindex()]
    fits = str.__eq__ if exact else str.startswith
    if not any(fits(name, each) for name in found for each in listed):
        raise _no_interface(_NCCL)


def _no_interface(variable: str) -> LaunchError:
    error = LaunchError(
        f"`{variable}` ({os.environ.get(variable, '')[:80]}) must name an interface of this host "
        f"({socket.gethostname()}) that has an address; it has {_names()}"
    )
    error.is_shown = launcher.local_rank() != 0  # all processes of a host find it
    return error


def _names() -> str:
    return ", ".join(name for _, name in socket.if_nameindex())


def _own_address() -> str:
    """Return where gloo listens: at an interface, or where the host's own name resolves to."""
    if interface := os.environ.get(_GLOO):
        return f"`{_GLOO}` ({interface})"
    name = socket.gethostname()
    try:
        return f"{socket.gethostbyname(name)}, to which the host's name ({name}) resolves"
    except OSError:
        return f"loopback, because the host's name ({name}) does not resolve"
