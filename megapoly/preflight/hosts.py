"""What ``megapoly launch`` checks on each host before torchrun starts: options, names, ports."""

from __future__ import annotations

import argparse
import re
import socket
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from megapoly.config.ranges import MOST_PROCESSES, Range, whole_number
from megapoly.errors import LaunchError, PeerError
from megapoly.platform import launcher
from megapoly.platform.meeting import answers, open_store, port_in_use, wait_for_name
from megapoly.preflight.host_meeting import HostMeeting

_KINDS = ("auto", "cpu", "gpu", "xpu")
_NODES = re.compile(r"([1-9][0-9]{0,6})(?::([1-9][0-9]{0,6}))?")
_SETTING = re.compile(r"[^=,\s]+=[^=,]+")
_DEFAULT_PORT = 29500


def check_options(options: argparse.Namespace) -> None:
    """Check the options of torchrun that it would answer with a stack trace.

    Raises:
        LaunchError: with all that are wrong.
    """
    if problems := list(_problems(options)):
        raise LaunchError("; ".join(problems))


def _problems(options: argparse.Namespace) -> Iterator[str]:
    processes = str(options.nproc_per_node)
    if processes not in _KINDS and whole_number(processes, Range(1, MOST_PROCESSES)) is None:
        yield (
            f"`--nproc-per-node` ({processes[:80]}) must be a number of processes, 1 to "
            f"{MOST_PROCESSES}, or gpu for one on each GPU"
        )
    elif processes == "gpu" and not torch.cuda.is_available():
        yield (
            "`--nproc-per-node` (gpu) needs a CUDA GPU and PyTorch built for it, and this process "
            "sees none; give a number"
        )
    nodes = _NODES.fullmatch(str(options.nnodes))
    if nodes is None or num_hosts(options) < int(nodes[1]):
        yield f"`--nnodes` ({options.nnodes}) must be a number of hosts, or LEAST:MOST"
    elif is_static(options) and not 0 <= options.node_rank < num_hosts(options):
        yield (
            f"`--node-rank` ({options.node_rank}) must be below `--nnodes` ({options.nnodes}): the "
            f"hosts are 0 to {num_hosts(options) - 1}"
        )
    if not 0 < (options.master_port or _DEFAULT_PORT) < 65536:
        yield f"`--master-port` ({options.master_port}) must be a port, 1 to 65535"
    if options.max_restarts < 0:
        yield f"`--max-restarts` ({options.max_restarts}) must be 0 or more"
    settings = options.rdzv_conf.split(",") if options.rdzv_conf.strip() else []
    if not all(map(_SETTING.fullmatch, settings)):
        yield f"`--rdzv-conf` ({options.rdzv_conf}) must be KEY=VALUE,KEY=VALUE"
    try:
        parse_rendezvous_endpoint(options.rdzv_endpoint or None, _DEFAULT_PORT)
    except ValueError:
        yield f"`--rdzv-endpoint` ({options.rdzv_endpoint}) must be HOST:PORT, as gpu01:29500"


def num_hosts(options: argparse.Namespace) -> int:
    """Return the most hosts that the job may have; 0 if ``--nnodes`` is no number."""
    nodes = _NODES.fullmatch(str(options.nnodes))
    return 0 if nodes is None else int(nodes[2] or nodes[1])


def is_static(options: argparse.Namespace) -> bool:
    """Return whether the first host serves the store at an address that all are given.

    As ``torch.distributed.run`` decides: without a port, one host chooses a free one.
    """
    one_host = num_hosts(options) == 1 and options.master_port is None
    chosen = options.standalone or (one_host and not options.rdzv_endpoint)
    return options.rdzv_backend == "static" and not chosen


def added_options(options: argparse.Namespace) -> list[str]:
    """Return options of torchrun to put before those that were given.

    One host needs no name: its processes meet by ``localhost``. Several wait for each other as
    long as ``MEGAPOLY_JOIN_TIMEOUT_S`` says, unless ``--rdzv-conf`` does.
    """
    added = []
    if num_hosts(options) == 1 and not is_static(options) and options.local_addr is None:
        added.append("--local-addr=localhost")
    if num_hosts(options) > 1 and "timeout=" not in options.rdzv_conf:
        limit = f"{launcher.join_timeout_s():.0f}"
        settings = [options.rdzv_conf] if options.rdzv_conf.strip() else []
        settings += [f"timeout={limit}" if is_static(options) else f"join_timeout={limit}"]
        added.append(f"--rdzv-conf={','.join(settings)}")
    return added


def wait_for_hosts(options: argparse.Namespace) -> dist.Store | None:
    """Wait until all hosts have joined the store of the first one; by another backend, for a name.

    Returns:
        The store, which torchrun uses as well, to be kept until it ends; None if it makes its own.

    Raises:
        LaunchError: this host's name does not resolve, which the other hosts need.
        PeerError: the first host is not found or does not answer in time, its port is in use, or
            hosts are missing.
    """
    limit_s, hosts = launcher.join_timeout_s(), num_hosts(options)
    if not is_static(options):
        if hosts == 1:
            return None
        endpoint = str(options.rdzv_endpoint)
        if endpoint and options.rdzv_backend == "c10d":
            host, port = parse_rendezvous_endpoint(endpoint, _DEFAULT_PORT)
            wait_for_name(host, "--rdzv-endpoint", limit_s)
            if answers(host, port):  # another host of the job, or another program
                open_store(
                    host, port, f"`--rdzv-endpoint` ({endpoint})", limit_s=limit_s, serves=False
                )
        _check_own_name(options.local_addr)
        return None
    endpoint = options.rdzv_endpoint or f"[{options.master_addr}]"
    host, port = parse_rendezvous_endpoint(endpoint, options.master_port or _DEFAULT_PORT)
    option = "--rdzv-endpoint" if options.rdzv_endpoint else "--master-addr"
    wait_for_name(host, option, limit_s)
    if options.node_rank == 0:
        _check_port(port, option if options.rdzv_endpoint else "--master-port")
    if hosts == 1:
        return None
    return HostMeeting(host, port, option, number=options.node_rank, num_hosts=hosts).join(limit_s)


def _check_own_name(local_addr: str | None) -> None:
    name = local_addr or socket.getfqdn()
    try:
        socket.getaddrinfo(name, None)
    except (OSError, UnicodeError):
        raise LaunchError(
            f"the name of this host ({name}) does not resolve, and the other hosts may need it; "
            "give an address that they reach, `--local-addr ADDRESS`"
        ) from None


def _check_port(port: int, option: str) -> None:
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        if not isinstance(error, PermissionError):
            in_use = port_in_use(f"`{option}`", port)
            raise PeerError(f"{in_use}; `--standalone` chooses a free one for one host") from error
        raise PeerError(
            f"`{option}` ({port}) must be a port that you may open, from 1024"
        ) from error
