"""The rank's side of the watch: where it is, and how long it may be silent.

Functions of this module do nothing in a process that is not watched, such as an evaluation.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megapoly.config import Config
from megapoly.platform import launcher
from megapoly.training.watchdog.beats import Beats, new_file
from megapoly.training.watchdog.evidence import STACK_SIGNAL
from megapoly.training.watchdog.watcher import END, RECORD, Watched

if TYPE_CHECKING:
    import torch.distributed as dist

FOLDER = "diagnostics"
# Steps of a process that may take long: they compile, tune and allocate.
WARM_UP_STEPS = 2
_ROOT = Path(__file__).parents[3]
_LEAST_S, _STEPS, _WINDOW = 60.0, 10.0, 50
# Parts of the limit of a collective: until a rank is called silent, and to collect reports.
_SILENT, _COLLECT = 0.8, 0.1
_LONGEST_COLLECT_S = 60.0
_MEETING = 1.1  # of the limit for the processes to meet, which has its own messages


class Limits:
    """How long a rank may be silent.

    In a step, 60 s or 10 times the median of the last 50 steps, whichever is longer, but at most
    80 % of the time that a collective may wait, so that the diagnosis is complete before the
    collective fails. Elsewhere (start, first steps, evaluation, saving) these 80 %.

    Args:
        config: resolved.
    """

    def __init__(self, config: Config) -> None:
        collective_s = 60 * config.parallel.distributed_timeout_minutes
        self._given_s = config.parallel.hang_timeout_s
        self._times: deque[float] = deque(maxlen=_WINDOW)
        self._num_steps = 0
        self.slow_s = max(_SILENT * collective_s, self._given_s or 0.0)
        self.collect_s = min(_COLLECT * collective_s, _LONGEST_COLLECT_S)
        self.meeting_s = _MEETING * launcher.join_timeout_s()

    def add_step(self, step_time_s: float) -> None:
        """Count a step."""
        self._num_steps += 1
        if self._num_steps > WARM_UP_STEPS:
            self._times.append(step_time_s)

    @property
    def step_s(self) -> float:
        """Of a step."""
        if self._num_steps < WARM_UP_STEPS:
            return self.slow_s
        if self._given_s is not None:
            return self._given_s
        median = statistics.median(self._times) if self._times else 0.0
        return min(self.slow_s, max(_LEAST_S, _STEPS * median))


class Heartbeat:
    """Beats of this process.

    Args:
        beats: memory that the watcher reads.
        limits: how long it may be silent.
        has_watcher: without one the limits have no effect.
    """

    def __init__(self, beats: Beats, limits: Limits, *, has_watcher: bool = True) -> None:
        self.beats, self.limits, self.has_watcher = beats, limits, has_watcher
        self._now: tuple[str, float, bool] = ("", 0.0, False)
        self.enter("start of the process", limits.slow_s, True)

    def enter(self, phase: str, limit_s: float, uses_files: bool) -> tuple[str, float, bool]:
        """Set what the rank does; return what it did."""
        previous, self._now = self._now, (phase, limit_s, uses_files)
        self.beats.enter(phase, limit_s, uses_files=uses_files)
        return previous

    def allow(self, limit_s: float) -> None:
        """Change how long the rank may be silent in what it does."""
        self.enter(self._now[0], limit_s, self._now[2])


_heartbeat: Heartbeat | None = None


def current() -> Heartbeat | None:
    """Return the heartbeat of this process; None if it is not watched."""
    return _heartbeat


def beat() -> None:
    """Say that this rank advances."""
    if _heartbeat is not None:
        _heartbeat.beats.beat()


def waits(is_waiting: bool) -> None:
    """Say whether this rank waits for others in a collective."""
    if _heartbeat is not None:
        _heartbeat.beats.wait(is_waiting)


def begin(phase: str) -> None:
    """Say what this rank does from here on. It may take long and uses files."""
    if _heartbeat is not None:
        _heartbeat.enter(phase, _heartbeat.limits.slow_s, True)


@contextlib.contextmanager
def during(phase: str, *, uses_files: bool = True) -> Iterator[None]:
    """Say what this rank does for the duration of a context; it may take long.

    Args:
        phase: what it does.
        uses_files: bytes that it or its processes read or write count as an advance.
    """
    if _heartbeat is None:
        yield
        return
    previous = _heartbeat.enter(phase, _heartbeat.limits.slow_s, uses_files)
    try:
        yield
    finally:
        _heartbeat.enter(*previous)


@contextlib.contextmanager
def meeting() -> Iterator[None]:
    """Say that this rank waits until all have started; that has a limit and messages of its own."""
    if _heartbeat is None:
        yield
        return
    previous = _heartbeat.enter("meeting", _heartbeat.limits.meeting_s, False)
    yield
    _heartbeat.enter(*previous)


def begin_step(step: int) -> None:
    """Say that this rank begins a step."""
    if _heartbeat is not None:
        _heartbeat.beats.begin_step(step)
        _heartbeat.enter("step", _heartbeat.limits.step_s, False)


def end_step(step_time_s: float) -> None:
    """Say that this rank has finished a step, and how long that took."""
    if _heartbeat is not None:
        _heartbeat.limits.add_step(step_time_s)
        _heartbeat.enter("step", _heartbeat.limits.step_s, False)


def name_job(store: dist.Store) -> None:
    """Agree on the name of the job's start, a folder's: its time on rank 0's host."""
    if _heartbeat is None:
        return
    key = f"start/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    if launcher.rank() == 0:
        store.set(key, time.strftime("%Y-%m-%dT%H-%M-%S"))
    _heartbeat.beats.name_job(store.get(key).decode())


@contextlib.contextmanager
def watched(config: Config) -> Iterator[None]:
    """Watch this process for the duration of a context.

    If ``hang_timeout_s`` is 0, only what it does is noted, and no watcher is started.

    Args:
        config: resolved.
    """
    global _heartbeat
    limits, has_watcher = Limits(config), config.parallel.hang_timeout_s != 0
    with contextlib.ExitStack() as resources:
        memory = new_file()
        beats = Beats(memory)
        resources.callback(os.close, memory)
        resources.callback(beats.close)
        _heartbeat = Heartbeat(beats, limits, has_watcher=has_watcher)
        try:
            with _watcher(config, limits, memory) if has_watcher else contextlib.nullcontext():
                yield
        finally:
            _heartbeat = None


@contextlib.contextmanager
def _watcher(config: Config, limits: Limits, memory: int) -> Iterator[None]:
    """Run the watcher of this process for the duration of a context."""
    stacks = os.memfd_create("megapoly-stacks")
    ours, theirs = socket.socketpair()
    with contextlib.ExitStack() as resources:
        resources.callback(os.close, stacks)
        faulthandler.register(STACK_SIGNAL, file=stacks, all_threads=True)
        resources.callback(faulthandler.unregister, STACK_SIGNAL)
        resources.enter_context(_answering(ours))
        watcher = _start(config, limits, memory, stacks, theirs)
        try:
            yield
        finally:
            watcher.kill()
            watcher.wait()


def _start(
    config: Config, limits: Limits, memory: int, stacks: int, talk: socket.socket
) -> subprocess.Popen[bytes]:
    """Start the watcher of this process."""
    with talk:
        watched = Watched(
            rank=launcher.rank(),
            world_size=launcher.world_size(),
            host=socket.gethostname(),
            pid=os.getpid(),
            folder=str(Path(config.run_dir, FOLDER).absolute()),
            collect_s=limits.collect_s,
            beats=memory,
            stacks=stacks,
            talk=talk.fileno(),
            status=launcher.HUNG,
            status_file=os.environ.get(launcher.STATUS_FILE),
            status_text=launcher.STATUS_HUNG,
            run_status=str(Path(config.run_dir).absolute()) if launcher.rank() == 0 else None,
        )
        # -S: without site-packages, whose .pth files may import anything.
        command = [sys.executable, "-S", "-m", "megapoly.training.watchdog.watcher"]
        return subprocess.Popen(
            [*command, watched.to_json()],
            env=os.environ | {"PYTHONPATH": str(_ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=(memory, stacks, talk.fileno()),
        )


@contextlib.contextmanager
def _answering(talk: socket.socket) -> Iterator[None]:
    """Answer the watcher, in a thread that sleeps until it asks."""
    thread = threading.Thread(target=_answer, args=[talk], name="watchdog", daemon=True)
    thread.start()
    with talk:
        yield
        talk.shutdown(socket.SHUT_RDWR)
        thread.join()


def _answer(talk: socket.socket) -> None:
    while request := talk.recv(1):
        if request == RECORD:
            talk.sendall(json.dumps(_flight_record()).encode() + b"\n")
        elif request == END:
            flush = threading.Thread(target=sys.stdout.flush, daemon=True)
            flush.start()
            flush.join(1.0)  # the main thread may hold the stream
            os._exit(launcher.HUNG)


def _flight_record() -> dict[str, Any]:
    """Return what torch's flight recorder has, and the ranks of its process groups."""
    import torch
    import torch.distributed as dist

    c10d: Any = torch._C._distributed_c10d
    # Torch 2.10, as in docker/Dockerfile, has NCCL's alone.
    dump = getattr(c10d, "_dump_fr_trace_json", None) or c10d._dump_nccl_trace_json
    names = dist.distributed_c10d._world.pg_names if dist.is_initialized() else {}
    return {
        "record": json.loads(dump()),
        "members": {name: dist.get_process_group_ranks(group) for group, name in names.items()},
    }
