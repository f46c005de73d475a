"""Run a function on several processes of this host, as a job.

Importing torch and the engine takes seconds; a fork server does it once for a whole test session.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

from megapoly.platform.processes import die_with_parent

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["megapoly.preflight.local_ranks_preload"])
# The fork server has set the engine up for CPU, in every process that it starts.
_CONTEXT_OF_GPUS = multiprocessing.get_context("spawn")


def run_on_ranks(
    function: Callable[..., Any],
    num_ranks: int,
    *args: Any,
    timeout_s: float = 300.0,
    device: str = "cpu",
) -> list[Any]:
    """Call ``function(*args)`` on every rank of a job, with torchrun's environment set.

    Args:
        function: importable from a module; it creates its own process groups.
        num_ranks: number of processes, one thread each.
        *args: the same for every rank; picklable.
        timeout_s: seconds for all of them together.
        device: ``cpu`` or ``cuda``: what ``function`` runs on. For ``cuda`` the engine is neither
            imported nor changed before.

    Returns:
        The result of each rank.

    Raises:
        RuntimeError: a rank failed; with its traceback.
        TimeoutError: a rank did not end in time.
    """
    context = _CONTEXT_OF_GPUS if device == "cuda" else _CONTEXT
    processes: list[Any] = []
    connections: list[Connection] = []
    with environments(num_ranks) as of_ranks:
        try:
            for environment in of_ranks:
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(
                    target=_worker, args=(sender, environment, function, args)
                )
                process.start()
                sender.close()
                processes.append(process)
                connections.append(receiver)
            return _collect(connections, timeout_s)
        finally:
            for process in processes:
                process.join(timeout=10)
                if process.is_alive():
                    process.kill()
                    process.join()


@contextlib.contextmanager
def environments(num_ranks: int) -> Iterator[list[dict[str, str]]]:
    """Serve the key-value store of a job on this host; yields the variables of each rank.

    They are those that torchrun sets. As under torchrun, the ranks do not serve the store: the
    kernel gives this process a free port at the moment at which it listens, so that no other
    program can take it before.

    Args:
        num_ranks: number of processes.
    """
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
    try:
        yield [
            {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(num_ranks),
                "LOCAL_WORLD_SIZE": str(num_ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
            }
            for rank in range(num_ranks)
        ]
    finally:
        del store


def _collect(connections: list[Connection], timeout_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    pending: list[Any] = list(connections)
    while pending:
        ready: list[Any] = wait(pending, timeout=timeout_s)
        if not ready:
            missing = [i for i, connection in enumerate(connections) if connection in pending]
            raise TimeoutError(f"ranks {missing} did not end within {timeout_s} s")
        for connection in ready:
            pending.remove(connection)
            rank = connections.index(connection)
            try:
                failure, results[rank] = connection.recv()
            except EOFError:
                failure = "the process ended without a result"
            if failure:
                raise RuntimeError(f"rank {rank} failed:\n{failure}")
    return [results[rank] for rank in range(len(connections))]


def _worker(
    sender: Connection, environment: dict[str, str], function: Callable[..., Any], args: Any
) -> None:
    die_with_parent()
    import torch

    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        message: tuple[str | None, Any] = (None, function(*args))
    except BaseException:
        message = (traceback.format_exc(), None)
    # Not `send`, which shares a tensor's memory with this process: it ends before that is read.
    sender.send_bytes(pickle.dumps(message))
