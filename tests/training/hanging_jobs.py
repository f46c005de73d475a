"""Jobs whose ranks are processes of their own, of which one stops advancing."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from processes import wait_until
from tiny_jobs import TINY

from megapoly import pretrain
from megapoly.config.recipes import FOLDER as RECIPES
from megapoly.preflight.local_ranks import _CONTEXT, environments
from megapoly.testing.jobs import shared_cache
from megapoly.training.watchdog import heartbeat

SIX_STEPS = TINY | {"training.train_iters": 6, "checkpoint.save": False}


@dataclass(frozen=True)
class Ended:
    """A job that has ended.

    Args:
        statuses: exit statuses of its ranks, negative after a signal.
        errors: what each rank has written to stderr.
    """

    statuses: list[int]
    errors: list[str]

    @property
    def output(self) -> str:
        return "".join(self.errors)


def run(
    folder: Path,
    options: dict[str, object],
    num_ranks: int,
    prepare: Callable[..., None],
    *args: object,
) -> Ended:
    """Train with ``megapoly.pretrain.main`` until all ranks have ended, and their watchers.

    Args:
        folder: of the run, ``run``, and the output of the ranks.
        options: of the configuration.
        num_ranks: processes; each is the first of its host.
        prepare: called first on every rank, before ``args``.
        *args: of ``prepare``.
    """
    options = (
        SIX_STEPS | {"run_dir": folder / "run", "data.cache_dir": shared_cache().name} | options
    )
    argv = [f"--{name}={value}" for name, value in options.items()]
    logs, processes = [folder / f"rank_{rank}.log" for rank in range(num_ranks)], []
    with environments(num_ranks) as of_ranks:
        for environment, log in zip(of_ranks if num_ranks > 1 else [{}], logs, strict=True):
            process = _CONTEXT.Process(target=_rank, args=(environment, log, argv, prepare, args))
            process.start()
            processes.append(process)
        for process in processes:
            process.join()
    wait_until(lambda: not processes_of(folder))
    return Ended([process.exitcode for process in processes], [log.read_text() for log in logs])


def processes_of(folder: Path) -> list[str]:
    """Return the commands of the processes, watchers among them, whose arguments name a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            command = path.read_bytes().replace(b"\0", b" ").decode()
            if "watchdog" in command and str(folder) in command:
                found.append(command)
    return found


def _rank(
    environment: dict[str, str],
    log: Path,
    argv: list[str],
    prepare: Callable[..., None],
    args: tuple[object, ...],
) -> None:
    import torch

    multiprocessing.set_start_method("fork", force=True)  # as in a process that was not forked
    os.environ.update(environment)
    torch.set_num_threads(1)
    os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    prepare(*args)
    status = pretrain.main(argv, default_recipe=RECIPES / "dense_tiny.yaml", program="pretrain")
    sys.stderr.flush()
    os._exit(status)


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def never_return() -> None:
    threading.Event().wait()


def hang_in_step(of_rank: int, act: Callable[[], None], step_number: int = 3) -> None:
    """In a step all ranks may be silent for 2 s, and one of them stops advancing."""
    from megapoly.training import step

    original = step.compute_gradients

    def compute(state, batches):
        if state.iteration == step_number - 1:
            heartbeat.current().allow(0.5 if rank() == of_rank else 2.0)
            if rank() == of_rank:
                act()
        return original(state, batches)

    step.compute_gradients = compute


def hang_in_data_worker(of_rank: int, act: Callable[[], None]) -> None:
    """The data worker of one rank stops before its first batch."""
    from megapoly.data import loader

    hang_in_step(of_rank, lambda: None, step_number=1)
    if rank() == of_rank:
        loader._begin_worker = lambda worker: act()


def hang_in_data(of_rank: int, act: Callable[[], None]) -> None:
    """One rank opens its data and stops; the others wait for it."""
    from megapoly.data import corpus

    original = corpus.load_corpus

    def load(*args, **kwargs):
        heartbeat.current().allow(0.5 if rank() == of_rank else 2.0)
        if rank() == of_rank:
            act()
        return original(*args, **kwargs)

    corpus.load_corpus = load


def hang_in_save(of_rank: int, act: Callable[[], None]) -> None:
    """One rank, or its writer, hangs before it writes its file; the others wait for it."""
    from megapoly.training import checkpoint_files
    from megapoly.training.save_checkpoint import CheckpointSaver

    finish, write = CheckpointSaver.finish, checkpoint_files._write

    def write_or_hang(transforms, rank_process, *args):
        if rank() == of_rank:
            if os.getpid() == rank_process:
                heartbeat.current().allow(0.5)
            act()
        write(transforms, rank_process, *args)

    def finish_within(saver, *, wait):
        if wait:
            heartbeat.current().allow(0.5 if rank() == of_rank else 2.0)
        return finish(saver, wait=wait)

    checkpoint_files._write = write_or_hang
    CheckpointSaver.finish = finish_within


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise RuntimeError("a defect")


def note_watchers(folder: Path) -> None:
    """Print the number of watchers in the last step."""
    from megapoly.training import step

    original = step.compute_gradients

    def compute(state, batches):
        if state.iteration == state.train_iters - 1:
            print(f"watchers: {len(processes_of(folder))}", file=sys.stderr)
        return original(state, batches)

    step.compute_gradients = compute
