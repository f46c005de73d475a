"""Jobs that save in the background, with writers that wait, fail or are killed."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megapoly.config.recipes import FOLDER as RECIPES
from megapoly.pretrain import configure, pretrain
from megapoly.training import checkpoint_files, loop
from megapoly.training.hooks import CheckpointHook
from megapoly.training.reporter import Reporter
from megapoly.training.save_checkpoint import CheckpointSaver

# In a run's folder: writers wait for the first; each writes its process id to the second.
GO, WRITER = "go", "writer-of-rank-{}"


def run(argv: list[str]) -> str:
    """Train; return what was printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        pretrain(configure(argv, default_recipe=RECIPES / "dense_tiny.yaml", program="pretrain"))
    return printed.getvalue()


def run_past_writers(argv: list[str], run_dir: Path, iteration: int) -> str:
    """Train; what is saved in the background is written after a later step only."""
    _writers_wait(run_dir)
    _after_step(iteration, (run_dir / GO).touch)
    return run(argv)


def run_until_a_save_waits(argv: list[str], run_dir: Path) -> str:
    """Train; writers wait until the next checkpoint waits for them."""
    _writers_wait(run_dir)
    message = Reporter.message

    def message_and_go(self: Reporter, text: str) -> None:
        message(self, text)
        if text.startswith("waiting for"):
            (run_dir / GO).touch()

    Reporter.message = message_and_go  # in this process alone, which ends with the job
    return run(argv)


def run_to_divergence(argv: list[str], run_dir: Path) -> str:
    """Train until a loss is not finite; writers wait until then."""
    _writers_wait(run_dir)
    at_divergence = CheckpointHook.at_divergence

    def go(self: CheckpointHook) -> None:
        (run_dir / GO).touch()
        at_divergence(self)

    CheckpointHook.at_divergence = go
    return run(argv)


def run_and_die(argv: list[str], run_dir: Path, iteration: int) -> str:
    """Train, and be killed after a step, while an earlier one is being saved."""
    _writers_wait(run_dir)

    def die() -> None:
        while not (run_dir / WRITER.format(dist.get_rank())).exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

    _after_step(iteration, die)
    return run(argv)


def run_stopped(argv: list[str], run_dir: Path, iteration: int) -> str:
    """Train; be requested to stop while an earlier step is being saved."""

    def stop() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    _after_step(iteration, stop)
    return run_until_a_save_waits(argv, run_dir)


def run_with_failures(argv: list[str]) -> str:
    """Train; the second rank's first writer is killed and its second finds the disk full."""
    write, saves = checkpoint_files._write_file, 0
    save = CheckpointSaver.save

    def count(self: CheckpointSaver, *, in_background: bool) -> Path | None:
        nonlocal saves
        saves += 1
        return save(self, in_background=in_background)

    def fail(*args: Any) -> Any:
        if dist.get_rank() == 1 and saves == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if dist.get_rank() == 1 and saves == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(*args)

    CheckpointSaver.save, checkpoint_files._write_file = count, fail
    return run(argv)


def _writers_wait(run_dir: Path) -> None:
    write, rank_process = checkpoint_files._write_file, os.getpid()

    def wait_and_write(*args: Any) -> Any:
        if os.getpid() != rank_process:
            (run_dir / WRITER.format(dist.get_rank())).write_text(str(os.getpid()))
            while not (run_dir / GO).exists():
                time.sleep(0.01)
        return write(*args)

    checkpoint_files._write_file = wait_and_write


def _after_step(iteration: int, act: Callable[[], None]) -> None:
    step = loop.train_step

    def step_and_act(state: Any, *args: Any, **kwargs: Any) -> Any:
        result = step(state, *args, **kwargs)
        if state.iteration == iteration:
            act()
        return result

    loop.train_step = step_and_act
