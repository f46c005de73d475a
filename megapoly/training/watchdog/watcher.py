"""The process that watches one rank: ``python -m megapoly.training.watchdog.watcher``.

It needs the standard library alone. It reads the rank's beats, and when these stop for longer than
the rank allows, it

1. writes the stacks of the rank and its processes, the flight record of its collectives and a
   report into ``RUN_DIR/diagnostics/START_OF_THE_JOB/``, which calls the other ranks' watchers;
2. waits for their reports, and prints on each host which rank is behind;
3. ends the rank with the status of a hang.

It dies with its rank.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from megapoly.training.watchdog import evidence
from megapoly.training.watchdog.beats import Beats, Position
from megapoly.training.watchdog.evidence import Report
from megapoly.training.watchdog.verdict import conclude

RECORD, END = b"r", b"e"  # what the rank is asked for
_ADVANCE_BYTES = 1 << 20  # a line of a log is none
_SET_PDEATHSIG = 1  # PR_SET_PDEATHSIG in linux/prctl.h
_LONGEST_PAUSE_S = 1.0
_LOOK_EVERY = 5  # pauses between two looks for a call, while the rank advances
_ANSWER_S = 10.0  # for the flight record and for the end of the rank
_DISK_S = 20.0  # for files; the disk may be what hangs


@dataclass(frozen=True)
class Watched:
    """The rank that is watched.

    Args:
        rank: its number.
        world_size: ranks of the job.
        host: name of its host.
        pid: its process, the parent of the watcher.
        folder: of all hangs of the run.
        collect_s: longest wait for the reports of other ranks.
        beats: descriptor of the memory with its beats.
        stacks: descriptor of the file that its stacks are written to.
        talk: descriptor of the socket that it answers on.
        status: exit status of a hang.
        status_file: that tells the launcher of a hang; None: there is none.
        status_text: what it is to hold.
        run_status: folder whose ``status.json`` is to say so; None: not this rank's.
    """

    rank: int
    world_size: int
    host: str
    pid: int
    folder: str
    collect_s: float
    beats: int
    stacks: int
    talk: int
    status: int
    status_file: str | None
    status_text: str
    run_status: str | None = None

    def to_json(self) -> str:
        """Return the text that the program takes."""
        return json.dumps(asdict(self))


class Silence:
    """Counts how long a rank has been silent.

    Only time during which the watcher runs counts: after a pause of the whole machine, or of the
    job in a terminal, nobody has been silent.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._last: object = None

    def look(self, progress: object, pause_s: float, passed_s: float) -> float:
        """Return the seconds since the rank's progress was another one.

        Args:
            progress: anything that differs when the rank has advanced.
            pause_s: that the watcher meant to sleep since the last look.
            passed_s: that has passed.
        """
        if progress != self._last:
            self._last, self.seconds = progress, 0.0
        else:
            self.seconds += min(passed_s, 2 * pause_s)
        return self.seconds


class Watcher:
    """Watches one rank until that ends.

    Args:
        watched: the rank.
    """

    def __init__(self, watched: Watched) -> None:
        self._watched = watched
        self._beats = Beats(watched.beats)
        self._talk = socket.socket(fileno=watched.talk)
        self._started = time.strftime("%Y-%m-%dT%H-%M-%S")

    def run(self) -> None:
        """Watch, and end the rank when it hangs."""
        silence, looks = Silence(), 0
        begin = time.monotonic()
        while True:
            position = self._beats.read()
            pause = min(_LONGEST_PAUSE_S, position.limit_s / 20)
            time.sleep(pause)
            looks, now = looks + 1, time.monotonic()
            silent_s = silence.look(self._progress(), pause, now - begin)
            self._beats.note_silence(silent_s)
            begin = now
            is_called = (2 * silent_s > position.limit_s or looks % _LOOK_EVERY == 0) and (
                self._is_called(position)
            )
            if is_called or silent_s > position.limit_s:
                report, files = self._report(self._beats.read(), silent_s)
                if report.is_debugged and not is_called:
                    silence = Silence()
                    continue
                try:
                    self._diagnose(self._folder(position), report, files)
                finally:
                    self._end(report.workers)
                return

    def _progress(self) -> object:
        position = self._beats.read()
        moved = evidence.bytes_moved(self._watched.pid) if position.uses_files else 0
        return position.beats, moved // _ADVANCE_BYTES

    def _folder(self, position: Position) -> Path:
        name = position.job or f"{self._started}.rank_{self._watched.rank}"
        return Path(self._watched.folder, name)

    def _is_called(self, position: Position) -> bool:
        """Return whether the watcher of another rank has reported a hang."""
        return (
            self._watched.world_size > 1
            and bool(position.job)
            and (self._folder(position).exists())
        )

    def _diagnose(self, folder: Path, report: Report, files: dict[str, object]) -> None:
        """Write what is known of the rank, collect what is known of the others, and conclude."""
        watched = self._watched
        contents = files | {"json": report.to_json()}
        within(_DISK_S, lambda: _write(folder, contents, watched.rank))
        reports = {watched.rank: report} | self._collect(folder)
        verdict = conclude(reports, watched.world_size)
        count = (
            "" if watched.world_size == 1 else f" of {len(reports)} of {watched.world_size} ranks"
        )
        where = f"{verdict.sentence}. Stacks{count} are in {folder}"
        if watched.run_status is not None:
            within(_DISK_S, lambda: _note_failure(watched, verdict.sentence))
        if watched.rank == min(reports):
            lines = "".join(f"{line(reports[rank])}\n" for rank in sorted(reports))
            within(_DISK_S, lambda: (folder / "summary.txt").write_text(f"{where}\n\n{lines}"))
        if watched.rank == min(rank for rank, each in reports.items() if each.host == watched.host):
            # In one write, which no line of another process interrupts.
            os.write(2, f"{where}; the job ends with status {watched.status}\n".encode())

    def _report(self, position: Position, silent_s: float) -> tuple[Report, dict[str, object]]:
        """Return the report on the rank, and the contents of its other files by their endings."""
        watched = self._watched
        its = evidence.process(watched.pid)
        state = "" if its is None else its.state
        stack = evidence.stacks(watched.pid, watched.stacks)
        workers = evidence.descendants(watched.pid)
        parts = [f"rank {watched.rank}, pid {watched.pid}, state {state}\n{stack}"]
        for worker in workers:
            text = evidence.stacks(worker.pid, watched.stacks)
            parts.append(f"{worker.name}, pid {worker.pid}, state {worker.state}\n{text}")
        files: dict[str, object] = {"stack": "\n".join(parts)}
        groups = None
        if state.upper() != evidence.STOPPED and (answer := self._flight_record()) is not None:
            files["flight.json"] = answer["record"]
            groups = evidence.groups_of(answer["record"], answer["members"])
        report = Report(
            rank=watched.rank,
            host=watched.host,
            pid=watched.pid,
            phase=position.phase,
            step=position.step,
            silent_s=round(silent_s, 1),
            limit_s=position.limit_s,
            state=state,
            is_in_wait=position.waits,
            frames=evidence.main_thread(stack),
            workers=workers,
            groups=groups,
        )
        return report, files

    def _flight_record(self) -> dict | None:
        """Return the flight record and the members of the groups; None if the rank is mute."""
        answer = b""
        self._talk.settimeout(_ANSWER_S)
        try:
            self._talk.sendall(RECORD)
            while not answer.endswith(b"\n"):
                part = self._talk.recv(1 << 16)
                if not part:
                    return None
                answer += part
            return json.loads(answer)
        except (OSError, ValueError):
            return None

    def _collect(self, folder: Path) -> dict[int, Report]:
        """Wait for the reports of the other ranks, and return those that there are."""
        found: dict[int, Report] = {}
        deadline = time.monotonic() + self._watched.collect_s
        others = set(range(self._watched.world_size)) - {self._watched.rank}
        while True:
            within(_DISK_S, lambda: found.update(_read(folder, others - found.keys())))
            if len(found) == len(others) or time.monotonic() > deadline:
                return found
            time.sleep(max(0.1, 1e-3 * self._watched.world_size))  # many read the same folder

    def _end(self, workers: list[evidence.Process]) -> None:
        """End the rank with the status of a hang, or kill it and what it has started."""
        watched = self._watched
        if watched.status_file is not None:
            with contextlib.suppress(OSError):
                Path(watched.status_file).write_text(watched.status_text)
        _die_with_parent(0)  # its processes are killed after it
        with contextlib.suppress(OSError):
            self._talk.sendall(END)
        with contextlib.suppress(ProcessLookupError):
            os.kill(watched.pid, signal.SIGCONT)  # a stopped process reads its end, and ends
        deadline = time.monotonic() + _ANSWER_S
        while _is_alive(watched.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        if _is_alive(watched.pid):
            _kill(watched.pid)
        for worker in workers:
            _kill(worker.pid)


def line(report: Report) -> str:
    """Return where a rank is, as a line of the summary."""
    where = report.waits_in and f", waits in {report.waits_in}"
    place = report.place and f", at {report.place}"
    stopped = ", stopped" if report.is_stopped else ""
    workers = "".join(f"; {each.name} {each.pid} {each.state}" for each in report.workers)
    return (
        f"rank {report.rank} on {report.host}, pid {report.pid}{stopped}: {report.phase}, step "
        f"{report.step}, silent {report.silent_s:.1f} s of {report.limit_s:g}{where}{place}"
        f"{workers}"
    )


def within(limit_s: float, work: Callable[[], object]) -> None:
    """Do work with files, but go on after a limit: a disk that does not respond may be the hang."""

    def attempt() -> None:
        try:
            work()
        except OSError as error:
            print(f"hang: diagnostics are incomplete: {error}", file=sys.stderr, flush=True)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(limit_s)


def _note_failure(watched: Watched, sentence: str) -> None:
    # Here and not above: there are as many watchers as ranks, and few ever need it.
    from megapoly.training.run_status.record import note_failure

    assert watched.run_status is not None
    note_failure(Path(watched.run_status), watched.pid, watched.status, sentence)


def _write(folder: Path, contents: dict[str, object], rank: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for ending, content in contents.items():  # the report last: it says that the others are there
        text = content if isinstance(content, str) else json.dumps(content, indent=1)
        partial = folder / f".rank_{rank}.{ending}.partial"
        partial.write_text(text)
        partial.replace(folder / f"rank_{rank}.{ending}")


def _read(folder: Path, ranks: set[int]) -> dict[int, Report]:
    names: set[str] = set()
    with contextlib.suppress(FileNotFoundError):  # this disk refused the folder, others may not
        names = set(os.listdir(folder))
    present = [rank for rank in sorted(ranks) if f"rank_{rank}.json" in names]
    texts = {rank: (folder / f"rank_{rank}.json").read_text() for rank in present}
    return {rank: Report.from_json(json.loads(text)) for rank, text in texts.items()}


def _is_alive(pid: int) -> bool:
    its = evidence.process(pid)
    return its is not None and its.state != "Z"


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _die_with_parent(number: int) -> None:
    ctypes.CDLL(None).prctl(_SET_PDEATHSIG, number, 0, 0, 0)


def main(argv: list[str]) -> None:
    """Watch the rank that the argument describes."""
    watched = Watched(**json.loads(argv[0]))
    _die_with_parent(signal.SIGKILL)
    if os.getppid() != watched.pid:
        return
    # Requests to stop are the rank's: it saves, and is watched until it has ended.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    Watcher(watched).run()


if __name__ == "__main__":
    main(sys.argv[1:])
