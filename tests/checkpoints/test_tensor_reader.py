"""Nothing that a checkpoint names is executed when it is read."""

from __future__ import annotations

import builtins
import io
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_checkpoints import make_checkpoint, tensors
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megapoly.checkpoints.tensor_metadata import NAME, read_metadata
from megapoly.checkpoints.tensor_reader import TensorReader, load_object
from megapoly.errors import CheckpointError


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "iter_0000006")


class Touch:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


class TouchAndGiveBack:
    """A pickle that makes a file and yields the object that belongs there."""

    def __init__(self, path: Path, right: bytes):
        self.path, self.right = path, right

    def __reduce__(self) -> Any:
        touch = f"open({str(self.path)!r}, 'w').close()"
        code = f"[{touch}, __import__('pickle').loads({self.right!r})][1]"
        return builtins.eval, (code,)


def test_the_index_is_what_torch_reads(checkpoint: Path) -> None:
    """Entries of every dtype, of objects, and the folder that an import wrote to."""
    theirs = FileSystemReader(checkpoint).read_metadata()
    reader = TensorReader(checkpoint)
    ours = reader.read_metadata()
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.storage_data == theirs.storage_data
    assert reader.read_metadata() is ours
    dtypes = {
        entry.properties.dtype
        for entry in ours.state_dict_metadata.values()
        if isinstance(entry, TensorStorageMetadata)
    }
    assert dtypes == {torch.float32, torch.bfloat16, torch.int64, torch.uint8}


def test_every_dtype_of_torch_is_known(checkpoint: Path) -> None:
    index = FileSystemReader(checkpoint).read_metadata()
    index.planner_data = [each for each in vars(torch).values() if isinstance(each, torch.dtype)]
    (checkpoint / NAME).write_bytes(pickle.dumps(index))
    assert read_metadata(checkpoint).planner_data == index.planner_data


def test_code_in_the_index_is_refused_and_not_executed(checkpoint: Path, tmp_path: Path) -> None:
    executed, path = tmp_path / "executed", checkpoint / NAME
    right = path.read_bytes()
    pickles = [
        pickle.dumps(Touch(executed)),
        pickle.dumps(TouchAndGiveBack(executed, right)),
        *(pickle.dumps(TouchAndGiveBack(executed, right), protocol) for protocol in (0, 2)),
        b"cos\nsystem\n(S'touch " + str(executed).encode() + b"'\ntR.",
        # Names that begin in an allowed module, and attributes of allowed names.
        b"ctorch.serialization\nload\n(S'x'\ntR.",
        b"\x80\x04\x8c\x05torch\x8c\x14serialization.os.popen\x93\x8c\x01x\x85R.",
        b"\x80\x04\x8c\x05torch\x8c\x0dSize.__init__\x93.",
    ]
    for data in pickles:
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"\.metadata: it (names|is)"):
            read_metadata(checkpoint)
    assert not executed.exists()
    pickle.loads(pickles[1])
    assert executed.exists()  # without the reader it would be


@pytest.mark.parametrize(
    "data",
    [b"", b"no pickle", b"\x80\x04K\x01.", b"\x80\x04}." + bytes(9), b"\x80\xff", b"\x80\x04N."],
)
def test_what_is_no_index_is_refused(checkpoint: Path, data: bytes) -> None:
    (checkpoint / NAME).write_bytes(data)
    with pytest.raises(CheckpointError, match=r"\.metadata: it is"):
        read_metadata(checkpoint)


def test_files_elsewhere_are_refused(checkpoint: Path) -> None:
    for name in ("../other/__0_0.distcp", "/etc/passwd", "..", "", "inner/__0_0.distcp", None):
        index = FileSystemReader(checkpoint).read_metadata()
        entry = next(iter(index.storage_data.values()))
        entry.relative_path = name
        folder = checkpoint.with_name("changed")
        folder.mkdir(exist_ok=True)
        (folder / NAME).write_bytes(pickle.dumps(index))
        with pytest.raises(CheckpointError, match="must be in its own folder"):
            read_metadata(folder)


def saved(content: Any, *, is_zip: bool = True) -> io.BytesIO:
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=is_zip)
    stream.seek(0)
    return stream


def test_a_random_state_is_read() -> None:
    """Python's and NumPy's, as a checkpoint has them."""
    content = tensors()["random_state"] | {"torch": torch.get_rng_state(), "tracker": {}}
    loaded = load_object(saved(content))
    numpy_state = loaded["numpy"]
    assert loaded["words"] == content["words"]
    assert torch.equal(loaded["torch"], content["torch"])
    np.testing.assert_array_equal(numpy_state[1], content["numpy"][1])
    assert numpy_state[::2] == content["numpy"][::2]


def test_code_in_an_object_is_refused_and_not_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    executed = tmp_path / "executed"
    for is_zip in (True, False):
        stream = saved({"numpy": Touch(executed)}, is_zip=is_zip)
        with pytest.raises(CheckpointError, match="posix.system"):
            load_object(stream)
    data = saved({"a": 1}).getvalue()
    for damaged in (b"", data[:-30], data[:40]):
        with pytest.raises(CheckpointError, match="is damaged"):
            load_object(io.BytesIO(damaged))
    assert not executed.exists()
