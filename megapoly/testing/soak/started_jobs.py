"""Start jobs and find every process of theirs, also one that nobody waits for."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from megapoly.errors import MegapolyError
from megapoly.testing.soak.rank import NAN_STEPS, PIDS

# In the environment of every process of a soak. A fork, a process that it starts and an orphan have
# it as well, whatever session or process group they are in.
_MARK = "MEGAPOLY_SOAK"
_PAUSE_S = 0.01
_RANK = "megapoly.testing.soak.rank"

# Of a fault: a step that meets NaN, and the rank.
NanStep = tuple[int, int]


class Job:
    """A started job.

    Args:
        pid: of the launcher; of the only rank if the job is one process.
        pids: folder where each rank writes its process id.
        log: file for what the job prints; earlier jobs may have written to it.
        begin: size of the log before.
        poll: returns the exit status, minus a signal's number after a signal; None until the end.
    """

    def __init__(
        self, pid: int, pids: Path, log: Path, begin: int, poll: Callable[[], int | None]
    ) -> None:
        self.pid, self.log, self._pids, self.status = pid, log, pids, poll
        self._begin = begin

    def ranks(self) -> list[int]:
        """Return the process ids of the ranks that have started, by rank."""
        files = [path for path in self._pids.iterdir() if path.name.isdecimal()]
        return [int(path.read_text()) for path in sorted(files, key=lambda path: int(path.name))]

    def text(self) -> str:
        """Return what the job has printed."""
        return self.log.read_bytes()[self._begin :].decode(errors="replace")

    def wait(self, limit_s: float) -> int | None:
        """Return the exit status; None if the job has not ended in ``limit_s`` seconds."""
        wait_until(lambda: self.status() is not None, limit_s)
        return self.status()


class Jobs:
    """Context in which jobs of one shape are started; it leaves no process behind.

    Args:
        folder: for process ids; made by this.
        num_processes: of each job.
        new_processes: start every process with an interpreter of its own, as ``megapoly train``
            does, instead of forking one that has imported everything.
    """

    def __init__(self, folder: Path, *, num_processes: int, new_processes: bool) -> None:
        self._folder, self.num_processes = folder, num_processes
        self._mark = f"{_MARK}={uuid.uuid4().hex}"
        self._environment = dict(os.environ, **dict([self._mark.split("=")]))
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            self._environment.pop(name, None)
        self._template: subprocess.Popen[str] | None = None
        if not new_processes:
            command = [sys.executable, "-m", "megapoly.testing.soak.template"]
            self._template = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=self._environment,
                start_new_session=True,  # Ctrl-C is for this process, which ends the others
            )
            self._answer()

    def __enter__(self) -> Jobs:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        while found := self.processes():
            kill(found, signal.SIGKILL)
            time.sleep(_PAUSE_S)
        if self._template is not None:
            self._template.communicate()
        shutil.rmtree(self._folder, ignore_errors=True)

    def start(
        self,
        argv: Sequence[str],
        *,
        log: Path,
        nan_steps: Iterable[NanStep] = (),
        new_processes: bool = False,
    ) -> Job:
        """Start a job.

        Args:
            argv: arguments of ``megapoly train``.
            log: file for what it prints.
            nan_steps: steps and ranks whose gradient is NaN.
            new_processes: as of the class, for this job.
        """
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        environment = {PIDS: str(self._folder), NAN_STEPS: json.dumps(list(nan_steps))}
        log.touch()
        begin = log.stat().st_size
        if self._template is not None and not new_processes:
            request = {"argv": list(argv), "num_processes": self.num_processes}
            pid = self._ask(request | {"log": str(log), "environment": environment})
            return Job(pid, self._folder, log, begin, lambda: self._ask({"pid": pid}))
        with log.open("a") as output:
            process = subprocess.Popen(
                [*self._command(), *argv],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self._environment | environment,
                start_new_session=True,
            )
        return Job(process.pid, self._folder, log, begin, process.poll)

    def _command(self) -> list[str]:
        if self.num_processes == 1:
            return [sys.executable, "-m", _RANK]
        count = ["--nproc-per-node", str(self.num_processes)]
        return [sys.executable, "-m", "megapoly", "launch", "--standalone", *count, "-m", _RANK]

    def processes(self) -> dict[int, str]:
        """Return the commands of all processes of the jobs that are alive, by process id."""
        own = None if self._template is None else self._template.pid
        mark = self._mark.encode()
        found = {}
        for folder in Path("/proc").iterdir():
            if not folder.name.isdecimal() or int(folder.name) == own:
                continue
            # It has ended, or is another user's; the environment of a zombie is empty.
            with contextlib.suppress(OSError):
                if mark in (folder / "environ").read_bytes().split(b"\0"):
                    command = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
                    found[int(folder.name)] = command.decode(errors="replace").strip()
        return found

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._template is not None and self._template.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._template.stdin.write(json.dumps(request) + "\n")
            self._template.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._template is not None and self._template.stdout is not None
        line = self._template.stdout.readline()
        if not line:
            raise MegapolyError("the process that starts the jobs of the soak has ended; see above")
        return json.loads(line)


def kill(pids: Iterable[int], number: int) -> None:
    """Send a signal to processes; some may have ended."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def children(pids: Iterable[int]) -> list[int]:
    """Return the process ids of the children of some processes."""
    found: list[int] = []
    for pid in pids:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{pid}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
    return found


def wait_until(
    condition: Callable[[], object], limit_s: float, *, pause_s: float = _PAUSE_S
) -> bool:
    """Wait until a condition holds; return whether it does within ``limit_s`` seconds."""
    end = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(pause_s)
    return True
