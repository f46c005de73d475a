"""The scripts, called as their users call them."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from processes import num_lines, wait_until
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from megapoly.commands import launch
from megapoly.platform.launcher import (
    COMPLETE,
    DIVERGED,
    HUNG,
    STATUS_FILE,
    STATUS_HUNG,
    STOPPED,
)
from megapoly.testing.jobs import shared_cache

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
TINY = """
    --model.num_layers 2 --model.hidden_size 64 --model.activation_backend reference
    --training.seq_length 32 --training.micro_batch_size 1 --training.global_batch_size 4
    --optimizer.lr_warmup_iters 2 --training.eval_interval 0 --logging.tensorboard false
""".split()


def environment(num_processes):
    scripts = Path(sys.executable).parent  # where torchrun and megapoly-launch are
    path = f"{scripts}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "NPROC_PER_NODE": num_processes}


def losses(run_dir):
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return {record["iteration"]: record["lm_loss"] for record in map(json.loads, lines)}


def start(command, num_processes="2"):
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(num_processes),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_stops_on_request_and_resumes(tmp_path):
    """bash starts it, SIGTERM stops it (saved, status 0), torchrun resumes it to the end.

    Ctrl-C: tests/commands/test_train.py.
    """
    run_dir = tmp_path / "run"
    options = [*TINY, "--training.train_iters", "400", "--run_dir", str(run_dir)]
    options += ["--data.cache_dir", shared_cache().name]
    process = start(["bash", str(EXAMPLES / "pretrain_moe.sh"), *options])
    wait_until(lambda: num_lines(run_dir / "metrics.jsonl") >= 3, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    (checkpoint,) = (run_dir / "checkpoints").iterdir()
    stopped_at = int(checkpoint.name.removeprefix("iter_"))
    assert max(losses(run_dir)) == stopped_at
    assert f"stop requested: ending after step {stopped_at}" in output

    end = str(stopped_at + 2)
    decay = "--optimizer.lr_decay_iters=400"
    launch = [
        "torchrun",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(EXAMPLES / "pretrain_moe.sh"),
    ]
    process = start([*launch, *options, "--training.train_iters", end, decay])
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert f"at step {stopped_at}" in output
    assert max(losses(run_dir)) == stopped_at + 2


def test_five_mistakes_give_five_messages_and_start_nothing(tmp_path):
    run_dir = tmp_path / "run"
    mistakes = [
        "--model.activation=swiglue",
        "--training.global_batch_size=7",
        "--optimizer.min_lr=1.0",
        "--optimizer.adam_beta2=1.5",
        "--data.tokenizer=absent.json",
    ]
    script = str(EXAMPLES / "pretrain_dense.sh")
    process = start(["bash", script, *mistakes, "--run_dir", str(run_dir)], num_processes="1")
    output, _ = process.communicate()
    assert process.returncode == 2, output
    assert "The configuration has 5 problems:" in output
    for word in ("(swiglue)", "(7)", "(1.0)", "(1.5)", "absent.json"):
        assert word in output
    assert len(output.splitlines()) == 6, output  # and nothing else: no stack trace
    assert not run_dir.exists()


def test_a_loss_that_is_not_finite_has_a_status_of_its_own(tmp_path):
    too_fast = ["--optimizer.lr", "1e30", "--optimizer.clip_grad", "0", "--training.train_iters=5"]
    script = str(EXAMPLES / "pretrain_dense.sh")
    command = ["bash", script, *TINY, *too_fast, "--run_dir", str(tmp_path / "run")]
    command += ["--data.cache_dir", shared_cache().name]
    process = start(command, num_processes="1")
    output, _ = process.communicate()
    assert process.returncode == DIVERGED == 3, output
    assert "both must be finite" in output


def test_unknown_option_names_the_nearest(tmp_path):
    script = str(EXAMPLES / "pretrain_dense.sh")
    process = start(["bash", script, "--model.num_layer", "4"], num_processes="1")
    output, _ = process.communicate()
    assert process.returncode == 2
    assert "`model.num_layer`" in output and "`model.num_layers`" in output


@pytest.mark.parametrize("end, expected", [(STOPPED, 75), (COMPLETE, 0), (None, 0)])
def test_launcher_distinguishes_a_stopped_run_from_a_complete_one(monkeypatch, end, expected):
    """Also on hosts where torchrun ends by itself: another host's launcher got the signal."""

    def run(arguments):
        if end is not None:
            Path(os.environ[STATUS_FILE]).write_text(end)

    monkeypatch.setattr(launch, "torchrun", run)
    monkeypatch.setenv(STATUS_FILE, "restored after the test")
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    assert launch.main(["job.py"]) == 0
    monkeypatch.setenv("MEGAPOLY_STOPPED_STATUS", "75")
    assert launch.main(["job.py"]) == expected


@pytest.mark.parametrize("cause", ["failed", "signal"])
def test_launcher_has_the_status_of_a_hang(monkeypatch, capsys, cause):
    """Whether the watcher ended the worker, killed it, or a signal came at the same time."""
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=-9, error_file="")
    errors = {"failed": ChildFailedError("job", {1: failure}), "signal": SignalException("15", 15)}

    def run(arguments):
        Path(os.environ[STATUS_FILE]).write_text(STATUS_HUNG)
        raise errors[cause]

    monkeypatch.setattr(launch, "torchrun", run)
    monkeypatch.setenv(STATUS_FILE, "restored after the test")
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    assert launch.main(["job.py"]) == HUNG == 4
    assert capsys.readouterr().err == ""  # the watcher has said it


def test_launcher_refuses_what_is_no_status(monkeypatch, capsys):
    monkeypatch.setattr(launch, "torchrun", lambda arguments: pytest.fail("nothing must start"))
    monkeypatch.setenv("MEGAPOLY_STOPPED_STATUS", "256")
    assert launch.main(["job.py"]) == 2
    assert "`MEGAPOLY_STOPPED_STATUS` (256)" in capsys.readouterr().err


@pytest.mark.parametrize("ended", [True, False])
def test_launcher_says_whether_a_stopped_job_ended_as_it_should(
    tmp_path, monkeypatch, capsys, ended
):
    def stop(arguments):
        raise SignalException("signal 15", sigval=signal.SIGTERM)

    monkeypatch.setattr(launch, "torchrun", stop)
    status_file = tmp_path / "status"
    if ended:
        status_file.touch()
    assert launch._run(status_file, []) == (0 if ended else 128 + 15)
    message = "" if ended else "stopped before the workers had saved and ended: signal 15\n"
    assert capsys.readouterr().err == message
