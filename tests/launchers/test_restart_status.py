"""The status of ``megapoly launch`` says whether the job resumes if it is started again."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from megapoly.checkpoints.run_folder import checkpoint_path
from megapoly.commands import launch
from megapoly.errors import (
    CheckpointError,
    DivergenceError,
    LostPeerError,
    PeerError,
)
from megapoly.platform import launcher
from megapoly.platform.json_lines import lines
from megapoly.training.rank_zero_first import RankZeroFirst
from megapoly.training.starts import MOST_FROM_ONE_STEP, AdvanceHook, note_start

# Ends as the word after it that has the number of its rank says.
WORKER = """
import os, pathlib, signal, sys, time
from_start = pathlib.Path(os.environ["MEGAPOLY_STATUS_FILE"]).with_name("start")
from_start.write_text(sys.argv[1])
how = sys.argv[2 + int(os.environ["RANK"])]
if how == "waits":
    time.sleep(3600)
if how == "hung":
    pathlib.Path(os.environ["MEGAPOLY_STATUS_FILE"]).write_text("hung")
    sys.exit(4)
if how.startswith("signal"):
    os.kill(os.getpid(), int(how.removeprefix("signal")))
sys.exit(int(how))
"""
REASON = "not to be started again"


@pytest.fixture
def ended(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Give a function that launches a worker for each end, and returns status and errors."""
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)

    def run(*ends: str, reason: str = "", restart: str | None = None) -> tuple[int, str]:
        pid = os.fork()  # of a process that has imported torch
        if pid == 0:
            status = 99
            try:
                os.environ.pop(launcher.RESTART_STATUS, None)
                if restart is not None:
                    os.environ[launcher.RESTART_STATUS] = restart
                options = ["--standalone", "--nproc-per-node", str(len(ends))]
                status = launch.main([*options, str(worker), reason, *ends])
                sys.stderr.flush()
            finally:
                os._exit(status)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), capfd.readouterr().err

    return run


@pytest.mark.parametrize(
    ("end", "restart", "reason", "status"),
    [
        ("signal9", None, "", 137),
        ("signal9", "144", "", 144),
        ("5", None, "", 5),
        ("hung", "144", REASON, 1),
        ("signal15", None, REASON, 143),
        ("signal15", "144", REASON, 144),
        ("2", "144", REASON, 2),
    ],
)
def test_the_status_says_whether_to_start_again(ended, end, restart, reason, status) -> None:
    found, printed = ended(end, "waits", restart=restart, reason=reason)
    assert found == status
    assert (f"megapoly launch: {REASON}" in printed) == (status == 1)


@pytest.mark.parametrize(
    ("exitcodes_and_times", "rank"),
    [
        ([(5, 7), (-6, 7)], 1),  # rank 0 has lost rank 1
        ([(5, 7), (-15, 7)], 0),  # torchrun has ended rank 1
        ([(5, 7), (-9, 37)], 0),  # likewise, after 30 seconds
        ([(1, 9), (2, 8)], 1),
        ([(-15, 7), (3, 7)], 1),
    ],
)
def test_the_rank_that_failed_first_is_the_cause(exitcodes_and_times, rank) -> None:
    failures = {
        number: ProcessFailure(number, pid=1, exitcode=exitcode, error_file="")
        for number, (exitcode, _) in enumerate(exitcodes_and_times)
    }
    for number, (_, timestamp) in enumerate(exitcodes_and_times):
        failures[number].timestamp = timestamp
    assert launch._cause(ChildFailedError("job", failures))[0] == rank


def test_a_status_that_is_none_is_refused(ended) -> None:
    status, printed = ended("0", restart="yes")
    assert status == 2 and "`MEGAPOLY_RESTART_STATUS` (yes) must be an exit status" in printed


def test_each_error_has_one_status() -> None:
    failed = LostPeerError("rank 3 failed")
    failed.exit_status = 3
    errors = [
        ValueError(),
        CheckpointError(),
        PeerError(),
        DivergenceError(),
        LostPeerError(),
        failed,
    ]
    assert list(map(launcher.exit_status, errors)) == [1, 2, 2, 3, 5, 3]
    restarts = [status for status in range(256) if launcher.means_restart(status)]
    assert restarts == [launcher.HUNG, launcher.LOST_PEER, *range(129, 256)]


class Run:
    """A run's folder, and the launcher that its starts tell whether they advance."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.status_file = folder / "run", folder / "host" / "status"
        self.folder.mkdir()
        self.status_file.parent.mkdir()
        for name in ("RANK", "SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "JOBSET_UID", "JOBSET_NAME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(launcher.STATUS_FILE, str(self.status_file))

    def start(self) -> str:
        self.note(dist.HashStore(), rank=0)
        told = launcher.told_start(self.status_file)
        assert told is not None
        return told

    def note(self, store: dist.Store, rank: int) -> None:
        """Note a start on rank 0, or on rank 1 of another host."""
        job = RankZeroFirst(
            store, rank=rank, world_size=2, local_rank=0, cache_dir=self.folder, timeout_s=600.0
        )
        note_start(str(self.folder), job)

    def save(self, step: int) -> None:
        checkpoint = checkpoint_path(self.folder, step)
        checkpoint.mkdir(parents=True)
        (checkpoint / "run.json").touch()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return Run(tmp_path, monkeypatch)


def test_starts_from_one_step_are_counted(run: Run, monkeypatch) -> None:
    assert [bool(run.start()) for _ in range(MOST_FROM_ONE_STEP)] == [False, False, True]
    assert "this was start 4 from step 0" in run.start()
    run.save(20)
    assert run.start() == run.start() == ""
    assert "this was start 3 from step 20" in run.start()
    # Another job of a scheduler is a decision of a person.
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert run.start() == ""
    recorded = [line.record for line in lines(run.folder / "starts.jsonl")]
    assert [each["step"] for each in recorded] == [0, 0, 0, 0, 20, 20, 20, 20]
    assert [each["job"] for each in recorded] == [None] * 7 + ["7"]


def test_a_checkpoint_allows_another_start(run: Run) -> None:
    class Checkpoints:
        saved: Path | None = None

    for _ in range(MOST_FROM_ONE_STEP):
        reason = run.start()
    checkpoints = Checkpoints()
    hook = AdvanceHook(checkpoints)
    hook.after_record(None)
    assert launcher.told_start(run.status_file) == reason != ""
    checkpoints.saved = run.folder
    hook.after_record(None)
    assert launcher.told_start(run.status_file) == ""


def test_a_host_learns_the_count_of_rank_zero(run: Run) -> None:
    run.save(40)
    for _ in range(MOST_FROM_ONE_STEP):
        run.note(store := dist.HashStore(), rank=0)
    launcher.tell_start()
    run.note(store, rank=1)
    assert "start 3 from step 40" in launcher.told_start(run.status_file)
    assert len(list(lines(run.folder / "starts.jsonl"))) == MOST_FROM_ONE_STEP


def test_a_folder_that_cannot_be_written_is_a_warning(run: Run, caplog) -> None:
    (run.folder / "starts.jsonl").mkdir()
    assert run.start() == ""
    assert "starts.jsonl cannot be read or written: Is a directory" in caplog.text


NAMESPACE = ["unshare", "--map-root-user", "--mount"]
FULL_DISK = """
import os, pathlib, sys
from megapoly.platform import launcher
status_file = pathlib.Path(os.environ[launcher.STATUS_FILE])
launcher.reserve_status(status_file)
try:
    (status_file.parent / "other").write_bytes(bytes(1 << 20))
except OSError as error:
    print(error.strerror)
launcher.tell_status(launcher.STOPPED)
print(launcher.told_status(status_file))
"""


@pytest.mark.skipif(
    subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode != 0,
    reason="a disk of 64 kB needs a namespace with mounts of its own",
)
def test_a_stopped_job_says_so_on_a_full_disk(tmp_path: Path) -> None:
    mount = 'mount -t tmpfs -o size=64k none "$1" && shift && exec "$@"'
    program = [sys.executable, "-c", FULL_DISK]
    result = subprocess.run(
        [*NAMESPACE, "sh", "-c", mount, "sh", str(tmp_path), *program],
        env=os.environ | {launcher.STATUS_FILE: str(tmp_path / "status")},
        capture_output=True,
        text=True,
    )
    assert result.stdout == f"No space left on device\n{launcher.STOPPED}\n", result.stderr
