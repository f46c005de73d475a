"""`run.json` has the size and CRC-32 of every file, and proves its own content."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from made_checkpoints import RUN, make_checkpoint

from megapoly.checkpoints.run_file import run_text
from megapoly.checkpoints.seal import read_back_crc, seal
from megapoly.checkpoints.tensor_metadata import read_metadata
from megapoly.errors import CheckpointError


def test_sizes_and_crcs_are_those_of_the_bytes(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "iter_0000006")
    run = json.loads((folder / "run.json").read_text())
    read = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "run.json"
    }
    assert run["files"] == {
        name: {"bytes": len(data), "crc32": f"{zlib.crc32(data):08x}"}
        for name, data in read.items()
    }
    assert {"tokenizer/tokenizer.json", ".metadata", "__0_1.distcp"} <= set(read)
    assert {key: run[key] for key in RUN} == RUN


def test_what_torch_counted_is_not_read_again(tmp_path: Path) -> None:
    """A large tensor that changes before the seal keeps the CRC of what was in memory."""
    folder = make_checkpoint(tmp_path / "iter_0000006")
    before = json.loads((folder / "run.json").read_text())["files"]
    number = torch.randn(300, 100, generator=torch.Generator().manual_seed(1))[7, 7]
    flipped = 0
    for path in sorted(folder.glob("*.distcp")):
        data, wanted = path.read_bytes(), number.numpy().tobytes()
        if wanted in data:
            at = data.index(wanted)
            path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            flipped += 1
    assert flipped == 1
    seal(folder, RUN)
    assert json.loads((folder / "run.json").read_text())["files"] == before


def test_a_damaged_entry_is_not_sealed(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "iter_0000006")
    path = folder / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: the entry at byte \d+ is not"):
        seal(folder, RUN)


def test_run_json_is_written_last_and_all_is_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint(tmp_path / "iter_0000006")
    (folder / "run.json").unlink()
    flush, flushed = os.fsync, []

    def follow(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        flushed.append((path, (folder / "run.json").exists()))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", follow)
    seal(folder, RUN)
    names = [path for path, _ in flushed]
    assert set(names) == {*folder.rglob("*"), folder}
    assert names[-1] in (folder, folder / "tokenizer")
    before = names.index(folder / "run.json")
    assert not any(there for _, there in flushed[:before])


def test_run_json_is_the_same_text_again() -> None:
    """Also when it is read and written, which proves every byte of it."""
    content: dict[str, Any] = RUN | {"files": {"a": {"bytes": 1, "crc32": "00000000"}}}
    text = run_text(content)
    assert run_text(json.loads(text)) == text
    assert run_text(content | {"iteration": 7}) != text


def test_a_file_that_was_written_is_read_back(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "iter_0000006")
    places: dict[str, list[tuple[int, int]]] = {}
    for info in read_metadata(folder).storage_data.values():
        places.setdefault(info.relative_path, []).append((info.offset, info.length))
    read_back = {name: read_back_crc(folder / name, each) for name, each in places.items()}
    before = json.loads((folder / "run.json").read_text())["files"]
    assert {name: before[name] for name in read_back} == {
        name: {"bytes": size, "crc32": f"{crc:08x}"} for name, (size, crc) in read_back.items()
    }
    seal(folder, RUN, read_back=read_back)
    assert json.loads((folder / "run.json").read_text())["files"] == before

    name = max(read_back, key=lambda name: read_back[name])
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 16  # in a large tensor
    (folder / name).write_bytes(data)
    with pytest.raises(CheckpointError, match="is not what was written"):
        read_back_crc(folder / name, places[name])
