"""One job at a time in a run's folder."""

import errno
import fcntl
import json
import os
import signal

import pytest
from resuming_jobs import TINY

from megapoly.errors import LockError
from megapoly.testing import run_job, run_on_ranks
from megapoly.testing.jobs import shared_cache
from megapoly.training import run_lock
from megapoly.training.run_lock import check_sole, sole_job


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(run_lock, "_PATIENCE_S", 0.0)


def test_a_second_job_is_refused_with_host_process_and_age(tmp_path):
    with sole_job(tmp_path):
        with pytest.raises(LockError) as refusal, sole_job(tmp_path):
            pass
        holder = json.loads((tmp_path / ".lock").read_text())
    assert holder["pid"] == os.getpid()
    text = str(refusal.value)
    assert f"a job on {os.uname().nodename}, process {os.getpid()}, started 0:00:0" in text
    assert f"`kill {os.getpid()}`" in text and "choose another `run_dir`" in text


def test_the_lock_of_a_job_that_has_ended_is_taken_over(tmp_path):
    with sole_job(tmp_path):
        pass
    with sole_job(tmp_path):  # the file is still there
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_the_lock_of_a_killed_job_is_waited_for_and_taken_over(tmp_path, monkeypatch):
    receiver, sender = os.pipe()
    holder = os.fork()
    if holder == 0:
        with sole_job(tmp_path):
            os.write(sender, b"x")
            signal.pause()
    assert os.read(receiver, 1) == b"x"
    with pytest.raises(LockError, match=f"process {holder},"), sole_job(tmp_path):
        pass
    monkeypatch.setattr(run_lock, "_PATIENCE_S", 600.0)
    os.kill(holder, signal.SIGKILL)  # it may still be ending when this process asks
    with sole_job(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    os.waitpid(holder, 0)
    os.close(receiver)
    os.close(sender)


def test_a_process_that_the_job_forked_does_not_keep_the_lock(tmp_path):
    with sole_job(tmp_path):
        forked = os.fork()
        if forked == 0:
            signal.pause()
    with sole_job(tmp_path):
        pass
    os.kill(forked, signal.SIGKILL)
    os.waitpid(forked, 0)


def test_a_holder_that_is_not_named_is_still_refused(tmp_path):
    with (tmp_path / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(LockError, match="another job, uses"), sole_job(tmp_path):
            pass


@pytest.mark.parametrize(
    ("environment", "holder", "command"),
    [
        (
            {"SLURM_JOB_ID": "1234"},
            "Slurm job 1234, started",
            "(`scancel --batch --signal TERM 1234`: it saves first)",
        ),
        (
            {"SLURM_JOB_ID": "99", "SLURM_ARRAY_JOB_ID": "97", "SLURM_ARRAY_TASK_ID": "3"},
            "Slurm job 97_3, started",
            "(`scancel --batch --signal TERM 97_3`: it saves first)",
        ),
        (
            {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "POD_NAME": "llama-0-x7k2"},
            "pod llama-0-x7k2, started",
            "(delete what `kubectl -n team describe pod llama-0-x7k2` says controls it)",
        ),
        (
            {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "POD_NAME": "a-0-x7", "JOBSET_NAME": "a"},
            "pod a-0-x7, started",
            "(`kubectl -n team delete jobset a`)",
        ),
        (
            {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
            f"pod {os.uname().nodename}, started",
            f"`kubectl -n team describe pod {os.uname().nodename}`",
        ),
    ],
)
def test_the_refusal_names_what_manages_the_holder(
    tmp_path, monkeypatch, environment, holder, command
):
    (tmp_path / "namespace").write_text("team\n")
    monkeypatch.setattr(run_lock, "_NAMESPACE", tmp_path / "namespace")
    for name in (
        "SLURM_JOB_ID",
        "SLURM_ARRAY_JOB_ID",
        "KUBERNETES_SERVICE_HOST",
        "POD_NAME",
        "JOBSET_NAME",
    ):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with sole_job(tmp_path), pytest.raises(LockError) as refusal, sole_job(tmp_path):
        pass
    assert holder in str(refusal.value) and command in str(refusal.value)


def not_supported(*args):
    raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))


def test_without_locks_a_warning_names_the_last_job(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(fcntl, "flock", not_supported)
    with sole_job(tmp_path):
        assert "has no locks (Operation not supported)" in caplog.text
        assert "the last one there was" not in caplog.text
        with sole_job(tmp_path):
            assert f"the last one there was a job on {os.uname().nodename}" in caplog.text


def in_second_process(function):
    """Call a function in another process, and wait for it."""
    forked = os.fork()
    if forked == 0:
        try:
            function()
        finally:
            os._exit(0)
    os.waitpid(forked, 0)


def test_without_locks_the_first_job_notices_the_second(tmp_path, monkeypatch):
    def start():
        with sole_job(tmp_path):
            check_sole(tmp_path)
            (tmp_path / "trains").touch()

    monkeypatch.setattr(fcntl, "flock", not_supported)
    check_sole(tmp_path)  # of no job
    with sole_job(tmp_path):
        check_sole(tmp_path)
        in_second_process(start)
        assert (tmp_path / "trains").exists()
        with pytest.raises(LockError, match=r"a job on .* has begun in .* after this one"):
            check_sole(tmp_path)
        (tmp_path / ".lock").write_text("")  # unreadable: nobody is accused
        check_sole(tmp_path)
    start()
    with sole_job(tmp_path):
        (tmp_path / ".lock").unlink()
        check_sole(tmp_path)


def test_a_signature_that_cannot_be_written_accuses_nobody(tmp_path, monkeypatch):
    """The file then still names the job before."""
    with sole_job(tmp_path):
        pass
    before = (tmp_path / ".lock").read_text()

    def full(descriptor):
        (tmp_path / ".lock").write_text(before)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(run_lock.os, "fsync", full)
    with sole_job(tmp_path):
        assert (tmp_path / ".lock").read_text() == before
        check_sole(tmp_path)


def second_job(argv):
    """Return status and errors of a job that finds the folder in use, on one rank."""
    import contextlib
    import io

    from megapoly import pretrain

    run_lock._PATIENCE_S = 0.0
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        status = pretrain.main(argv, program="pretrain")
    return status, errors.getvalue()


def test_all_ranks_of_a_second_job_end_with_one_sentence_and_change_nothing(tmp_path):
    options = TINY | {"training.train_iters": 1}
    run_job("dense_tiny", tmp_path, options)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    # What a job of another process would still be writing.
    partial = tmp_path / "checkpoints" / ".iter_0000002.partial"
    partial.mkdir()
    options |= {"run_dir": tmp_path, "training.train_iters": 2}
    options |= {"data.cache_dir": shared_cache().name}
    argv = [f"--{name}={value}" for name, value in options.items()]
    with sole_job(tmp_path):
        results = run_on_ranks(second_job, 2, ["--config", "dense_tiny", *argv])
    assert [status for status, _ in results] == [2, 2]
    told = "".join(errors for _, errors in results)
    assert told.count("One job at a time trains in a `run_dir`") == 1
    assert partial.is_dir()
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    del before[tmp_path / ".lock"], after[tmp_path / ".lock"]
    assert after == before
    run_job("dense_tiny", tmp_path, TINY | {"training.train_iters": 2})
    assert not partial.exists()
