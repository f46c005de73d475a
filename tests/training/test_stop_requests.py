"""Requests to stop: those that come when the run has ended, and those that are none."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from tiny_jobs import TINY
from torch.distributed.elastic.multiprocessing.api import SignalException

from megapoly import pretrain
from megapoly.commands import launch
from megapoly.platform.processes import STOP_SIGNALS
from megapoly.testing import run_on_ranks
from megapoly.testing.jobs import shared_cache
from megapoly.training.stop import StopRequest


def request_stop() -> None:
    for number in STOP_SIGNALS:
        os.kill(os.getpid(), number)


def options(**more: object) -> list[str]:
    short = {"training.train_iters": 3, "data.cache_dir": shared_cache().name}
    values = TINY | short | more
    return [f"--{name}={value}" for name, value in values.items()]


def requested_late(folder: str) -> list[int]:
    """Train, with requests when the process groups are destroyed and when the program returns.

    Returns:
        The statuses of a run that is complete, and of one whose loss is not finite.
    """
    destroy = dist.destroy_process_group

    def request_and_destroy(*groups: object) -> None:
        request_stop()
        destroy(*groups)

    dist.destroy_process_group = request_and_destroy
    statuses = []
    for lr in (0.001, 1e30):
        argv = options(run_dir=f"{folder}/{lr}") + [f"--optimizer.lr={lr}"]
        statuses.append(pretrain.main(argv, default_recipe="dense_tiny", program="test"))
        request_stop()
    return statuses


def test_a_request_after_the_last_step_has_no_effect(tmp_path: Path) -> None:
    assert run_on_ranks(requested_late, 1, str(tmp_path)) == [[0, 3]]


def are_handlers_left(run_dir: str) -> bool:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    argv = options(run_dir=run_dir)
    assert pretrain.pretrain(pretrain.configure(argv, default_recipe="dense_tiny", program="test"))
    return before == [signal.getsignal(number) for number in STOP_SIGNALS]


def test_a_library_call_leaves_the_signals_as_they_were(tmp_path: Path) -> None:
    assert run_on_ranks(are_handlers_left, 1, str(tmp_path)) == [True]


def test_a_request_to_a_launcher_whose_job_has_ended_has_no_effect(monkeypatch) -> None:
    def raises(number: int, frame: object) -> None:
        raise SignalException("a signal", signal.Signals(number))

    def job_that_is_complete(arguments: list[str]) -> None:
        for number in STOP_SIGNALS:
            signal.signal(number, raises)  # as torchrun does, for good

    says = launch._says
    monkeypatch.setattr(launch, "torchrun", job_that_is_complete)
    monkeypatch.setattr(launch, "_says", lambda *of: request_stop() or says(*of))
    monkeypatch.setenv(launch.STATUS_FILE, "restored after the test")
    assert launch.main(["job.py"]) == 0


@pytest.mark.parametrize(("before", "requests"), [(signal.SIG_DFL, True), (signal.SIG_IGN, False)])
def test_a_closed_terminal_is_a_request_but_under_nohup(before, requests) -> None:
    previous = signal.signal(signal.SIGHUP, before)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.requested == requests
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.requested
        assert signal.getsignal(signal.SIGHUP) == before
    finally:
        signal.signal(signal.SIGHUP, previous)


# Signals that the launcher and the worker ignore; SIGHUP is bit 0.
IGNORED = """
import os
for pid in (os.getppid(), os.getpid()):
    (line,) = [x for x in open(f"/proc/{pid}/status") if x.startswith("SigIgn")]
    print("ignored" if int(line.split()[1], 16) & 1 else "not ignored")
"""


def test_a_launcher_under_nohup_and_its_workers_survive_the_terminal(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(IGNORED)
    launch_job = ["-m", "megapoly", "launch", "--standalone", str(tmp_path / "job.py")]
    for prefix, expected in (["nohup"], "ignored\nignored\n"), ([], "not ignored\n" * 2):
        # The tests themselves may have been started by nohup.
        command = ["env", "--default-signal=HUP", *prefix, sys.executable, *launch_job]
        result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        assert (result.returncode, result.stdout) == (0, expected)


def trained_without_a_reader(run_dir: str) -> int:
    """Train with output to a pipe that nobody reads, as after Ctrl-C in ``train | tee log``."""
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", closefd=False)
    return pretrain.main(options(run_dir=run_dir), default_recipe="dense_tiny", program="test")


def test_a_run_whose_output_nobody_reads_saves(tmp_path: Path) -> None:
    assert run_on_ranks(trained_without_a_reader, 1, str(tmp_path)) == [0]
    assert (tmp_path / "checkpoints" / "iter_0000003" / "run.json").exists()
