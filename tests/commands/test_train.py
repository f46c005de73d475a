"""``megapoly train`` and ``megapoly launch`` as their users call them."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from processes import num_lines, wait_until

from megapoly import pretrain
from megapoly.commands import launch, train
from megapoly.testing.jobs import shared_cache

ROOT = Path(__file__).parents[2]
TINY = """
    --config moe_tiny
    --model.num_layers 2 --model.hidden_size 64 --model.activation_backend reference
    --training.seq_length 32 --training.micro_batch_size 1 --training.global_batch_size 4
    --training.train_iters 400 --training.eval_interval 0 --training.device cpu
    --optimizer.lr_warmup_iters 2 --logging.tensorboard false
    --parallel.tensor_model_parallel_size 2 --parallel.expert_model_parallel_size 2
    --parallel.expert_tensor_parallel_size 1 --run_dir run
""".split()
PYTHON = [sys.executable, "-m"]


def start(folder, *arguments):
    inherited = {name: os.environ[name] for name in os.environ.keys() - {"RANK", "WORLD_SIZE"}}
    return subprocess.Popen(
        [*PYTHON, *arguments],
        cwd=folder,
        env=inherited | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process):
    output, errors = process.communicate()
    assert process.returncode == 0, output + errors
    return output


def lines_of(run_dir):
    metrics = run_dir / "metrics.jsonl"
    return metrics.read_text().splitlines() if metrics.exists() else []


def steps(run_dir):
    return [json.loads(line)["iteration"] for line in lines_of(run_dir)]


def test_ctrl_c_saves_and_torchrun_resumes(tmp_path):
    """In an empty folder: the recipe is found by its name."""
    options = [*TINY, "--data.cache_dir", shared_cache().name]
    process = start(tmp_path, "megapoly", "train", "--nproc-per-node", "2", *options)
    wait_until(lambda: num_lines(tmp_path / "run" / "metrics.jsonl") >= 3, process)
    os.killpg(process.pid, signal.SIGINT)  # Ctrl-C reaches every process of the terminal
    output = finish(process)
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    stopped_at = steps(tmp_path / "run")[-1]
    assert checkpoint.name == f"iter_{stopped_at:07d}"
    assert f"stop requested: ending after step {stopped_at}" in output

    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    more = ["--training.train_iters", str(stopped_at + 2), "--optimizer.lr_decay_iters", "400"]
    output = finish(start(tmp_path, *torchrun, "-m", "megapoly", "train", *options, *more))
    assert f"at step {stopped_at}" in output
    assert steps(tmp_path / "run") == list(range(1, stopped_at + 3))


def test_dry_run_of_a_larger_job(tmp_path):
    options = ["--dry-run", "--world-size", "64", "--training.global_batch_size", "256"]
    output = finish(start(tmp_path, "megapoly", "train", *TINY, *options))
    assert "of 64 ranks, which represent all" in output
    assert "all adds up: weights, gradient buffers, optimizer shards" in output
    assert list(tmp_path.iterdir()) == []


def test_the_module_is_the_same_program(tmp_path, capsys, monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    arguments = ["--print-config", "--training.device", "cpu", "--training.train_iters", "7"]
    monkeypatch.setattr(train, "end_on_signals", lambda work: work())
    with pytest.raises(SystemExit) as ended:
        train.main(arguments)
    assert ended.value.code == 0
    expected = capsys.readouterr().out
    assert "train_iters: 7\n" in expected
    assert finish(start(tmp_path, "megapoly.pretrain", *arguments)) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nproc-per-nod", "2"], "`nproc-per-nod`; the nearest is `--nproc-per-node`"),
        (["--dry-run", "--world-siz", "4"], "`world-siz`; the nearest is `--world-size`"),
        (["--conifg", "moe_tiny"], "`conifg`; the nearest is `--config`"),
        (["--nproc-per-node", "0"], "--nproc-per-node (0) must be a number"),
        (["--nproc-per-node"], "--nproc-per-node () must be a number"),
        (["--nproc-per-node", "9" * 5000], "must be a number of processes, 1 to 1024"),
    ],
)
def test_a_mistake_is_refused_with_the_nearest_flag(capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(train, "end_on_signals", lambda work: work())  # pytest keeps its handlers
    assert train.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_ctrl_c_before_the_first_step_ends_without_a_stack_trace(capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(train.pretrain, "main", interrupted)
    previous = signal.getsignal(signal.SIGTERM)
    try:
        assert train.main([]) == 130
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert capsys.readouterr().err == "stopped\n"


def test_processes_are_not_started_under_a_launcher(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(launch, "torchrun", lambda arguments: pytest.fail("nothing must start"))
    assert train.main(["--nproc_per_node=2"]) == 2
    assert "--nproc-per-node (2) cannot be used here: a launcher" in capsys.readouterr().err


def test_help_of_launch_describes_it_and_then_the_options_of_torchrun(capsys):
    with pytest.raises(SystemExit) as ended:
        launch.main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: megapoly launch [options of torchrun]")
    assert 0 < text.index("MEGAPOLY_STOPPED_STATUS") < text.index("--nproc-per-node NPROC_PER_NODE")


def test_launch_names_the_nearest_option(capsys):
    with pytest.raises(SystemExit) as ended:
        launch.main(["--nprocs-per-node", "2", "job.py"])
    assert ended.value.code == 2
    message = "unknown option --nprocs-per-node (the nearest is --nproc-per-node)"
    assert message in capsys.readouterr().err


def test_help_of_the_script_is_left_to_the_script(monkeypatch):
    given = []
    monkeypatch.setattr(launch, "torchrun", given.extend)
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    monkeypatch.setenv(launch.STATUS_FILE, "restored after the test")
    assert launch.main(["-m", "megapoly", "train", "--help"]) == 0
    assert given[-4:] == ["-m", "megapoly", "train", "--help"]


def test_a_run_dir_that_cannot_be_written_is_refused_before_the_work(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(train, "end_on_signals", lambda work: work())
    (tmp_path / "file").touch()
    file = tmp_path / "file"
    for run_dir, reason in (
        (file, "is not a folder"),
        (file / "run", f"cannot be made: {file} is not a folder"),
        # The name of one folder of /proc, in which the kernel makes none.
        (Path("/proc/run"), "cannot be written: No such file or directory"),
    ):
        assert train.main(["--run_dir", str(run_dir)]) == 2
        error = capsys.readouterr().err
        assert f"`run_dir` ({run_dir}) {reason}; " in error and "choose another folder" in error


def test_the_module_names_the_extra_that_is_missing(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert pretrain.main(["--print-config"], program="megapoly.pretrain") == 2
    expected = "Training needs tokenizers: pip install 'megapoly[train]'\n"
    assert capsys.readouterr().err == expected
