"""Worker processes, each with its own pipe, so that a dead worker is noticed at once."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import psutil

from megapoly.data.preprocess.tokenization import Backend, ReferenceBackend
from megapoly.data.preprocess.worker import Task, Worker, WorkerConfig, WorkerProgress
from megapoly.errors import DataError, MegapolyError
from megapoly.platform.processes import die_with_parent


class WorkerPool:
    """Processes that work on parts of the input.

    Args:
        config: settings of the workers.
        num_workers: number of processes.
        backend: shared with the workers if they are forked.
        reference: as ``backend``.
    """

    def __init__(
        self, config: WorkerConfig, num_workers: int, backend: Backend, reference: ReferenceBackend
    ) -> None:
        context = multiprocessing.get_context(_start_method())
        shared = (backend, reference) if context.get_start_method() == "fork" else (None, None)
        self._processes: list[Any] = []
        self._connections: list[Connection] = []
        for _ in range(num_workers):
            ours, theirs = context.Pipe()
            # A forked worker has copies of our ends of the pipes; while one is open, the other
            # workers would not notice that this process has died.
            inherited = [*self._connections, ours] if shared[0] else []
            process = context.Process(  # type: ignore[attr-defined] # contexts are typed as a base
                target=_serve, args=(theirs, config, shared, inherited), daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)

    def run(
        self,
        tasks: Sequence[Task],
        report: Callable[[WorkerProgress], None],
        *,
        tick: Callable[[], None],
    ) -> None:
        """Run all tasks, which may end in any order.

        Args:
            tasks: parts of the input, and files to hash.
            report: called with every progress message of a worker.
            tick: called at least twice a second.

        Raises:
            MegapolyError: raised by a worker.
            DataError: a worker died.
        """
        waiting = list(reversed(tasks))
        busy: dict[Connection, Task] = {}
        for connection in self._connections:
            self._give(connection, waiting, busy)
        while busy:
            for ready in wait(list(busy), timeout=0.5):
                assert isinstance(ready, Connection)
                message = self._receive(ready)
                if isinstance(message, WorkerProgress):
                    report(message)
                elif isinstance(message, Exception):
                    raise message
                else:
                    del busy[ready]
                    self._give(ready, waiting, busy)
            tick()

    def _give(
        self, connection: Connection, waiting: list[Task], busy: dict[Connection, Task]
    ) -> None:
        if waiting:
            busy[connection] = waiting.pop()
            connection.send(busy[connection])

    def _receive(self, connection: Connection) -> Any:
        try:
            return connection.recv()
        except (EOFError, ConnectionError) as error:
            process = self._processes[self._connections.index(connection)]
            process.join(timeout=5)
            raise DataError(
                f"A worker died (exit code {process.exitcode}; the system kills a process with -9 "
                "when memory runs out). Finished shards are kept: run the same command again, "
                "perhaps with fewer `--workers`."
            ) from error

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Kill the workers, whatever they are doing.

        Not by SIGTERM: what the handler of this process raises in a worker that is just being
        forked is lost in the interpreter's own functions for forks.
        """
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for connection in self._connections:
            connection.close()


def _start_method() -> str:
    """Return ``fork``, which shares the loaded tokenizer but needs a process of one thread."""
    return "fork" if sys.platform == "linux" and psutil.Process().num_threads() == 1 else "spawn"


def _serve(
    connection: Connection,
    config: WorkerConfig,
    shared: tuple[Backend | None, ReferenceBackend | None],
    inherited: Sequence[Connection],
) -> None:
    """Run a worker: receive parts, send progress and results, until the pipe is closed."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent kills its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for other in inherited:
        other.close()
    # A closed pipe: the parent has died.
    with contextlib.suppress(EOFError, ConnectionError):
        try:
            worker = Worker(config, *shared)
        except MegapolyError as error:
            connection.recv()
            connection.send(error)
            return
        while True:
            task: Task = connection.recv()
            try:
                worker.do(task, connection.send)
                connection.send(None)
            except MegapolyError as error:
                connection.send(DataError(str(error)))
            except ConnectionError:
                raise
            except Exception as error:  # a bug: the traceback helps to find it
                traceback.print_exc()
                connection.send(DataError(f"A worker failed at {task}: {error!r}"))
