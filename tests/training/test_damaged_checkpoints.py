"""Jobs with damaged checkpoints, and with checkpoints that name code."""

from __future__ import annotations

import builtins
import io
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from resuming_jobs import checkpoint, train
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from megapoly.checkpoints.seal import seal
from megapoly.checkpoints.verify import verify

STEPS = {"training.train_iters": 6, "checkpoint.save_interval": 2, "model.hidden_dropout": 0.1}
SHARDED = {"parallel.use_distributed_optimizer": True}
TIMES = {"step_time_s", "tokens_per_second", "tflops_per_device", "time"}


def flip(path: Path) -> None:
    data = path.read_bytes()
    middle = len(data) // 2
    path.write_bytes(data[:middle] + bytes([data[middle] ^ 8]) + data[middle + 1 :])


def results(job) -> list[dict[str, float]]:
    return [{k: v for k, v in line.items() if k not in TIMES} for line in job.metrics]


@pytest.mark.parametrize(
    ("options", "num_ranks"), [({}, 1), (SHARDED, 2)], ids=["one", "distributed-optimizer"]
)
def test_the_newest_whole_checkpoint_is_resumed_to_the_bit(tmp_path, options, num_ranks):
    """A flip in the tensors of the newest; a folder and a file that a crash has left."""
    whole = train(tmp_path, STEPS | options, num_ranks=num_ranks)
    shutil.rmtree(checkpoint(tmp_path, 6))
    flip(sorted(checkpoint(tmp_path, 4).glob("*.distcp"))[-1])
    checkpoint(tmp_path, 5).mkdir()
    checkpoint(tmp_path, 6).write_text("a file")
    resumed = train(tmp_path, STEPS | options, num_ranks=num_ranks)
    (loaded,) = (line for line in resumed.printed if line.startswith("loaded"))
    assert loaded == f"loaded {checkpoint(tmp_path, 2)}, at step 2"
    assert results(resumed) == results(whole)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "iter_0000002",
        "iter_0000004",
        "iter_0000004.damaged",
        "iter_0000005.damaged",
        "iter_0000006",
        "iter_0000006.damaged",
    ]


def test_a_checkpoint_that_was_moved_and_linked_is_kept_and_does_not_stop_later_saves(tmp_path):
    options = {"checkpoint.save_interval": 1, "optimizer.lr_decay_iters": 6}
    train(tmp_path, options | {"training.train_iters": 1})
    moved = checkpoint(tmp_path, 1).rename(tmp_path / "moved")
    checkpoint(tmp_path, 1).symlink_to(moved)
    train(tmp_path, options | {"training.train_iters": 4, "checkpoint.keep": 1})
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["iter_0000004"]
    assert not verify(moved).damages


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of one step, which no test changes."""
    folder = tmp_path_factory.mktemp("run")
    train(folder, {"training.train_iters": 1})
    return folder


def test_damaged_checkpoints_that_are_all_there_is_or_named_are_refused(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    named = checkpoint(copy, 1)
    flip(named / "common.pt")
    with pytest.raises(RuntimeError, match="The only checkpoint of .*: common.pt is damaged"):
        train(copy, {"training.train_iters": 2})
    assert named.is_dir()
    start = {"checkpoint.load": named, "training.train_iters": 1}
    for weights_only in ("true", "false"):
        options = start | {"checkpoint.load_weights_only": weights_only}
        with pytest.raises(RuntimeError, match=r"common\.pt is damaged .* Give another"):
            train(tmp_path / "other", options)


class Touch:
    """A pickle that makes a file, and yields the object that belongs there."""

    def __init__(self, path: Path, right: Any):
        self.path, self.right = path, pickle.dumps(right)

    def __reduce__(self) -> Any:
        touch = f"open({str(self.path)!r}, 'w').close()"
        return builtins.eval, (f"[{touch}, __import__('pickle').loads({self.right!r})][1]",)


def in_index(folder: Path, executed: Path) -> None:
    index = FileSystemReader(folder).read_metadata()
    (folder / ".metadata").write_bytes(pickle.dumps(Touch(executed, index)))


def in_common(folder: Path, executed: Path) -> None:
    common = torch.load(folder / "common.pt", weights_only=False)
    torch.save(Touch(executed, common), folder / "common.pt")


def in_random_state(folder: Path, executed: Path) -> None:
    """Bytes of ``torch.save`` inside of a .distcp file."""
    index = FileSystemReader(folder).read_metadata()
    for key, entry in index.storage_data.items():
        if isinstance(index.state_dict_metadata[key.fqn], BytesStorageMetadata):
            stream = io.BytesIO()
            torch.save(Touch(executed, None), stream)
            with (folder / entry.relative_path).open("ab") as file:
                entry.offset, entry.length = file.tell(), len(stream.getvalue())
                file.write(stream.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(index))


def elsewhere(folder: Path, executed: Path) -> None:
    """Tensors of a file outside of the folder, which exists."""
    index = FileSystemReader(folder).read_metadata()
    for entry in index.storage_data.values():
        shutil.copy(folder / entry.relative_path, folder.parent / entry.relative_path)
        entry.relative_path = f"../{entry.relative_path}"
    (folder / ".metadata").write_bytes(pickle.dumps(index))


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (in_index, r"/\.metadata: it names `builtins\.eval`"),
        (in_common, r"/common\.pt cannot be loaded: .*names code, which was not executed: .*eval"),
        (in_random_state, r"names code, which was not executed: .*eval"),
        (
            elsewhere,
            r"/\.metadata: it names .* all files of a checkpoint must be in its own folder",
        ),
    ],
)
def test_a_checkpoint_that_names_code_is_refused(run, tmp_path, attack, message, monkeypatch):
    """Sealed by who made it; as a run to resume, and as a checkpoint to start from."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    copy, executed = tmp_path / "copy", tmp_path / "executed"
    shutil.copytree(run, copy)
    folder = checkpoint(copy, 1)
    content = json.loads((folder / "run.json").read_text())
    attack(folder, executed)
    try:
        seal(folder, content)
    except Exception:  # the seal reads the index as loading does
        content.pop("files"), content.pop("crc32")
        (folder / "run.json").write_text(json.dumps(content))
    # One sentence that begins with the path: torch would say that there is no index at all.
    sentence = rf"\nmegapoly\.errors\.CheckpointError: {folder}[^\n]*{message}[^\n]*\n$"
    with pytest.raises(RuntimeError, match=sentence):
        train(copy, {"training.train_iters": 2})
    if attack is not in_random_state:  # which only resuming reads
        start = {"checkpoint.load": folder, "checkpoint.load_weights_only": "true"}
        with pytest.raises(RuntimeError, match=sentence):
            train(tmp_path / "other", {"training.train_iters": 1} | start)
    assert not executed.exists()
