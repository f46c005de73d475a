"""Network interfaces that a variable names: torch's own error, and NCCL's rules."""

from __future__ import annotations

import socket

import pytest
import torch.distributed as dist

from megapoly.errors import LaunchError, PeerError
from megapoly.platform import interfaces

NAMES = [name for _, name in socket.if_nameindex()]  # with lo


def group_with(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Create a process group of one rank by gloo, which looks for the interface."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", name)
    with interfaces.explained("gloo"):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    dist.destroy_process_group()


def test_an_interface_that_gloo_does_not_find(monkeypatch) -> None:
    with pytest.raises(LaunchError) as error:
        group_with(monkeypatch, "bond9")
    text = str(error.value)
    assert "`GLOO_SOCKET_IFNAME` (bond9) must name an interface" in text
    assert text.endswith(f"it has {', '.join(NAMES)}") and not error.value.is_shown
    # The first process of the host says it.
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(LaunchError) as error:
        group_with(monkeypatch, "bond9")
    assert error.value.is_shown


def test_an_interface_that_it_finds(monkeypatch) -> None:
    group_with(monkeypatch, "lo")


@pytest.mark.parametrize("value", ["", "lo", "l", "=lo", "bond,lo", "^lo", "^bond"])
def test_what_leaves_nccl_an_interface(value) -> None:
    interfaces.check_nccl(value)


@pytest.mark.parametrize("value", ["bond9", "=l", "=bond9,l", "ib,bond"])
def test_what_leaves_nccl_none(monkeypatch, value) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", value)
    with pytest.raises(LaunchError), interfaces.explained("cuda:nccl,cpu:gloo"):
        pytest.fail("the group must not be created")
    with interfaces.explained("gloo"):  # whose variable it is not
        pass


def test_processes_that_cannot_connect(monkeypatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    with pytest.raises(PeerError) as error, interfaces.explained("gloo"):
        raise RuntimeError("Gloo connectFullMesh failed with [/gloo/tcp/pair.cc:144] no error")
    assert "gloo listens at `GLOO_SOCKET_IFNAME` (lo)" in str(error.value)
    with pytest.raises(RuntimeError, match="^a defect$"), interfaces.explained("gloo"):
        raise RuntimeError("a defect")
