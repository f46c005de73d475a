import io
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from processes import wait_until
from rich.console import Console

from megapoly.study.comparison.jobs import JobRunner, TrialError, TrialJob
from megapoly.study.comparison.outcome import is_complete, last_record, validation_loss

# After SIGTERM it saves, which takes a while.
SAVES = """
import signal, sys, time
def save(*_):
    time.sleep(0.5)
    open(sys.argv[1] + "/saved", "w").close()
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
open(sys.argv[1] + "/begun", "w").close()
signal.pause()
"""
RUNS_TWO = """
import sys
from pathlib import Path
from rich.console import Console
from megapoly.commands import end_on_signals
from megapoly.study.comparison.jobs import TrialJob, JobRunner
folder = Path(sys.argv[1])
jobs = [TrialJob(n, [sys.executable, "-c", Path(sys.argv[2]).read_text(), str(folder / n)],
            folder / n, folder / (n + ".log"), 5) for n in ("a", "b", "c")]
runner = JobRunner(Console(), at_once=2, total=3, on_end=lambda *_: None)
sys.exit(end_on_signals(lambda: runner.run(jobs) or 0))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_requested_to_stop_it_lets_its_jobs_save(tmp_path: Path, number: signal.Signals) -> None:
    for name in "abc":
        (tmp_path / name).mkdir()
    (tmp_path / "job.py").write_text(SAVES)
    process = subprocess.Popen(
        [sys.executable, "-c", RUNS_TWO, str(tmp_path), str(tmp_path / "job.py")]
    )
    for name in "ab":
        wait_until((tmp_path / name / "begun").exists, process)
    os.kill(process.pid, number)
    assert process.wait() == 128 + number
    assert [(tmp_path / name / "saved").exists() for name in "abc"] == [True, True, False]
    assert not (tmp_path / "c/begun").exists()


def test_a_shell_that_waits_for_its_trainer_does_not_leave_it_behind(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(SAVES)
    command = [sys.executable, str(tmp_path / "job.py"), str(tmp_path)]
    job = TrialJob("a", ["sh", "-c", f"{shlex.join(command)}; true"], tmp_path, tmp_path / "log", 5)
    runner = JobRunner(Console(quiet=True), at_once=1, total=1, on_end=lambda *_: None)

    def stop(number: int, frame: object) -> None:
        if (tmp_path / "begun").exists():
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
        with pytest.raises(KeyboardInterrupt):
            runner.run([job])
    finally:
        signal.signal(signal.SIGALRM, previous)
    wait_until((tmp_path / "saved").exists)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_a_job_starts_does_not_leave_it_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """It arrives when the process exists and the runner does not know it yet."""
    (tmp_path / "job.py").write_text(SAVES)
    command = [sys.executable, str(tmp_path / "job.py"), str(tmp_path)]
    job = TrialJob("a", command, tmp_path, tmp_path / "log", 5)
    started = []

    class Signalled(subprocess.Popen):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **kwargs)
            started.append(self)
            wait_until((tmp_path / "begun").exists, self)
            signal.raise_signal(number)

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", Signalled)
    previous = signal.signal(number, stop)
    runner = JobRunner(Console(quiet=True), at_once=1, total=1, on_end=lambda *_: None)
    try:
        with pytest.raises(KeyboardInterrupt):
            runner.run([job])
        assert started[0].poll() == 0 and (tmp_path / "saved").exists()
        assert signal.getsignal(number) is stop
    finally:
        signal.signal(number, previous)


def test_a_job_that_is_killed_is_told_so(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    job = TrialJob("a", ["sh", "-c", "kill -9 $$"], tmp_path, tmp_path / "log", 5)
    with pytest.raises(TrialError, match="1 of 1 trials have failed"):
        JobRunner(console, at_once=1, total=1, on_end=lambda *_: None).run([job])
    assert isinstance(console.file, io.StringIO)
    assert "a: killed by SIGKILL; " in console.file.getvalue()


def test_progress_on_a_terminal_is_that_of_the_run(tmp_path: Path) -> None:
    line = {"iteration": 3, "lm_loss": 4.5, "step_time_s": 2.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    job = TrialJob(
        "polynorm",
        [sys.executable, "-c", "import time; time.sleep(1)"],
        tmp_path,
        tmp_path / "log",
        5,
    )
    with pytest.raises(TrialError, match="polynorm"):  # it ends without a checkpoint of step 5
        JobRunner(console, at_once=1, total=1, on_end=lambda *_: None).run([job])
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert "3/5" in shown
    assert "loss 4.5000 | ETA 0:00:04" in shown
    assert "polynorm: ended before its last step" in shown


def test_the_last_whole_line_counts(tmp_path: Path) -> None:
    assert last_record(tmp_path) == {}
    lines = [json.dumps({"iteration": i, "text": "x" * 100}) for i in range(1, 1001)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"iteration": 10')
    assert last_record(tmp_path)["iteration"] == 1000
    assert not is_complete(tmp_path, 1000)
    (tmp_path / "checkpoints/iter_0001000").mkdir(parents=True)
    (tmp_path / "checkpoints/iter_0001000/run.json").write_text("{}")
    assert is_complete(tmp_path, 1000)
    assert not is_complete(tmp_path, 1001)


def test_validation_loss_is_the_mean_or_the_only_one() -> None:
    assert validation_loss({"val/a/loss": 1.0, "val/b/loss": 3.0, "val/mean/loss": 2.5}) == 2.5
    assert validation_loss({"val/a/loss": 1.0, "val/a/ppl": 2.7}) == 1.0
    assert validation_loss({"lm_loss": 1.0}) is None
