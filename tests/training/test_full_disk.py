"""Runs on a disk that is full: training goes on, nothing saved is lost, all ranks agree."""

import json
import signal
import threading
from types import SimpleNamespace

import pytest
from full_disk_jobs import files_at_most, job_that_estimates_its_checkpoints, job_with_full_disk
from resuming_jobs import TINY, checkpoint
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megapoly.config import Config
from megapoly.testing import run_job, run_on_ranks
from megapoly.testing.jobs import shared_cache
from megapoly.training import room
from megapoly.training.tensorboard import TensorBoardHook

SAVING = TINY | {"training.train_iters": 6, "checkpoint.save_interval": 2}


def arguments(run_dir, options):
    fixed = {"run_dir": run_dir, "data.cache_dir": shared_cache().name}
    return [f"--{name}={value}" for name, value in (options | fixed).items()]


@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize("ranks", [[0], [1]])
def test_a_checkpoint_that_cannot_be_saved_does_not_end_the_run(tmp_path, ranks, in_background):
    options = SAVING | {"checkpoint.async_save": in_background}
    results = run_on_ranks(job_with_full_disk, 2, arguments(tmp_path, options), ranks, [4])
    assert [error for _, error in results] == [None, None]
    printed = results[0][0]
    (line,) = [line for line in printed.splitlines() if "was not saved" in line]
    assert line.startswith(f"warning: {checkpoint(tmp_path, 4)} was not saved: ")
    assert "File too large" in line and "bytes are free in" in line
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["iter_0000002", "iter_0000006"]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_a_last_checkpoint_that_cannot_be_saved_ends_the_run_with_its_error(tmp_path):
    argv = arguments(tmp_path, SAVING)
    results = run_on_ranks(job_with_full_disk, 2, argv, [1], [6])
    for _, error in results:
        assert error is not None and f"{checkpoint(tmp_path, 6)} was not saved: " in error
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["iter_0000002", "iter_0000004"]
    # The same command with room again.
    steps = run_job("dense_tiny", tmp_path, SAVING, num_ranks=2)
    whole = run_job("dense_tiny", tmp_path / "whole", SAVING, num_ranks=2)
    assert [step["lm_loss"] for step in steps] == [step["lm_loss"] for step in whole]
    assert checkpoint(tmp_path, 6).is_dir()


LAYOUTS = {
    "tensor": {"parallel.tensor_model_parallel_size": 2},
    "pipeline": {"parallel.pipeline_model_parallel_size": 2, "model.num_layers": 2},
    "distributed optimizer": {
        "parallel.use_distributed_optimizer": True,
        "training.bf16": True,
    },
    "experts": {
        "model.num_moe_experts": 2,
        "model.moe_ffn_hidden_size": 24,
        "model.moe_router_topk": 1,
        "parallel.expert_model_parallel_size": 2,
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_size_of_checkpoints_is_estimated_at_every_layout(tmp_path, layout):
    argv = arguments(tmp_path, TINY | {"training.train_iters": 1} | LAYOUTS[layout])
    estimates = run_on_ranks(job_that_estimates_its_checkpoints, 2, argv)
    entries = FileSystemReader(checkpoint(tmp_path, 1)).read_metadata().state_dict_metadata
    tensors = [entry for entry in entries.values() if isinstance(entry, TensorStorageMetadata)]
    num_bytes = sum(each.size.numel() * each.properties.dtype.itemsize for each in tensors)
    assert estimates == [num_bytes, num_bytes]


@pytest.mark.parametrize(
    ("keep", "saved", "iteration", "free", "needed"),
    [
        (2, 0, 0, 299, 300),  # two that are kept, and the next before an old one is deleted
        (2, 0, 0, 300, None),
        (2, 2, 20, 99, 100),
        (2, 3, 30, 99, 100),
        (0, 3, 30, 699, 700),  # all that are to come
        (2, 2, 95, 99, 100),  # the last one
        (2, 2, 100, 0, None),  # nothing is left to train
    ],
)
def test_room_is_warned_about_before_training(
    tmp_path, monkeypatch, keep, saved, iteration, free, needed
):
    for step in range(1, saved + 1):
        checkpoint(tmp_path, step).mkdir(parents=True)
        (checkpoint(tmp_path, step) / "run.json").touch()
    config = Config(run_dir=str(tmp_path))
    config.checkpoint.keep, config.checkpoint.save_interval = keep, 10
    state = SimpleNamespace(config=config, iteration=iteration, train_iters=100)
    monkeypatch.setattr(room, "tensor_bytes", lambda state: 100)
    monkeypatch.setattr(room, "is_rank_zero", lambda: True)
    # The run's own folder may be on another disk, which is not asked.
    disk = {checkpoint(tmp_path, 1).parent: SimpleNamespace(free=free)}
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: disk[path])
    told = []
    hook = room.RoomHook(state, told.append)
    expected = [] if needed is None else [f"needs about {needed} bytes and {free} are free"]
    assert len(told) == len(expected)
    assert all(part in line for part, line in zip(expected, told, strict=True))
    told.clear()
    state.iteration = 50
    disk[checkpoint(tmp_path, 1).parent].free = 99
    hook.after_record(SimpleNamespace())
    assert len(told) == 1 and "the next checkpoint needs about 100 bytes" in told[0]


@pytest.fixture
def no_signal_of_full_files():
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGXFSZ, handler)


def test_tensorboard_on_a_full_disk(tmp_path, no_signal_of_full_files, capfd):
    config = Config(run_dir=str(tmp_path))
    config.logging.log_interval = 1
    config.checkpoint.save_interval = 4
    state = SimpleNamespace(config=config, iteration=0, train_iters=100)
    told, hook_before = [], threading.excepthook
    hook = TensorBoardHook(state, told.append)

    def step():
        state.iteration += 1
        metrics = {"lm_loss": float(state.iteration)} | {f"x{i}": 1.0 for i in range(50)}
        result = SimpleNamespace(unusual="")
        hook.after_record(
            SimpleNamespace(metrics=metrics, details={}, is_evaluated=False, result=result)
        )

    with files_at_most(1000):
        for _ in range(5):
            step()
            if hook._writer is not None:
                hook._writer.file_writer.event_writer._async_writer._byte_queue.join()
        while hook._writer is not None:  # its thread writes when it wants to
            step()
    (line,) = told
    assert "tensorboard cannot be written: File too large" in line
    while hook._writer is None:
        step()
    assert "is written again" in told[1] and state.iteration % 4 == 0
    step()
    hook.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    written = [event.step for event in events.Scalars("Train/loss")]
    assert written[-1] == state.iteration
    assert threading.excepthook is hook_before
    assert "Traceback" not in capfd.readouterr().err
