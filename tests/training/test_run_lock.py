"""One job at a time in a run's folder."""

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
from megapoly.training.run_lock import sole_job


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


def test_without_locks_a_warning_is_logged(tmp_path, monkeypatch, caplog):
    def not_supported(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", not_supported)
    with sole_job(tmp_path), sole_job(tmp_path):
        pass
    assert "has no locks (Operation not supported)" in caplog.text


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
