"""Jobs of several processes that are killed: what is left of them, and whether the run resumes.

The launcher is a process that has imported everything and forks the ranks, which takes no seconds.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from megapoly import pretrain
from megapoly.config.recipes import FOLDER as RECIPES
from megapoly.preflight.local_ranks import environments

KINDS = ("launcher", "first rank", "last rank", "all", "launcher in a save", "rank in a save")


def killed(argv: list[str], run_dir: str, seeds: list[int], num_ranks: int) -> list[str]:
    """Start a job again and again and kill it; the kind and the moment come from the seed.

    Returns:
        For each seed the kind, and the processes of the job that are left when it is over.
    """
    return [_kill_once(argv, Path(run_dir), seed, num_ranks) for seed in seeds]


def finished(argv: list[str], num_ranks: int) -> int:
    """Run the job to its end and return its exit status."""
    launcher, _ = _start(argv, num_ranks)
    return os.waitstatus_to_exitcode(os.waitpid(launcher, 0)[1])


def _kill_once(argv: list[str], run_dir: Path, seed: int, num_ranks: int) -> str:
    draw = random.Random(seed)
    kind = KINDS[seed % len(KINDS)]
    before = _complete(run_dir)
    launcher, ranks = _start(argv, num_ranks)
    if draw.random() < 0.75:
        _wait(lambda: _complete(run_dir) != before, launcher)
    if "save" in kind:
        _wait(lambda: any(name.startswith(".iter") for name in _saved(run_dir)), launcher)
    else:
        time.sleep(draw.random() * 0.3)
    victims = {
        "launcher": [launcher],
        "first rank": ranks[:1],
        "last rank": ranks[-1:],
        "all": [launcher, *ranks],
        "launcher in a save": [launcher],
        "rank in a save": [draw.choice(ranks)],
    }[kind]
    for pid in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    os.waitpid(launcher, 0)
    # The kernel has sent the signals; a process needs a moment to end, however busy the machine.
    for _ in range(3000):
        left = _session(launcher)
        if not left:
            break
        time.sleep(0.01)
    described = "".join(f"; {_describe(pid)}" for pid in left)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return f"{kind}: {len(left)} left{described}"


def _start(argv: list[str], num_ranks: int) -> tuple[int, list[int]]:
    """Fork a launcher, in a session of its own, and the ranks; the launcher ends with a rank."""
    receiver, sender = os.pipe()
    launcher = os.fork()
    if launcher == 0:
        try:
            os.setsid()
            with environments(num_ranks) as of_ranks:
                ranks = [_fork_rank(argv, environment) for environment in of_ranks]
                os.write(sender, (" ".join(map(str, ranks)) + "\n").encode())
                statuses = []
                while len(statuses) < num_ranks and not any(statuses):
                    statuses.append(os.waitstatus_to_exitcode(os.wait()[1]))
                os._exit(any(statuses))
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    os.close(sender)
    with os.fdopen(receiver) as stream:
        return launcher, [int(pid) for pid in stream.readline().split()]


def _fork_rank(argv: list[str], environment: dict[str, str]) -> int:
    pid = os.fork()
    if pid:
        return pid
    os.environ.update(environment | {"TORCHELASTIC_RUN_ID": "killed"})
    multiprocessing.set_start_method("fork", force=True)  # as in a job of its own
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, sys.stdout.fileno())
    try:
        recipe = RECIPES / "dense_tiny.yaml"
        status = pretrain.main(argv, default_recipe=recipe, program="pretrain")
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stderr.flush()
    os._exit(status)


def _saved(run_dir: Path) -> set[str]:
    try:
        return set(os.listdir(run_dir / "checkpoints"))
    except FileNotFoundError:
        return set()


def _complete(run_dir: Path) -> set[str]:
    return {name for name in _saved(run_dir) if name.startswith("iter")}


def _wait(condition: Callable[[], bool], launcher: int) -> None:
    while not condition():
        if _is_gone(launcher):
            return
        time.sleep(0.002)


def _describe(pid: int) -> str:
    try:
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except (FileNotFoundError, ProcessLookupError):
        return f"{pid} ended late"
    shown = [line for line in status if line.startswith(("Name", "State", "PPid", "Threads"))]
    return f"{pid}: {shown}, {command}"


def _is_gone(pid: int) -> bool:
    return _stat(pid)[0] in ("Z", "")


def _session(leader: int) -> list[int]:
    """Return the processes of a session that have not ended."""
    pids = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
    return [pid for pid in pids if _stat(pid)[1] == str(leader) and not _is_gone(pid)]


def _stat(pid: int) -> tuple[str, str]:
    """Return state and session of a process; empty if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return "", ""
    return fields[0], fields[3]
