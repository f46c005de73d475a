"""Every change of every file of a checkpoint is found, by any number of ranks."""

from __future__ import annotations

import json
import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made_checkpoints import make_checkpoint

from megapoly.checkpoints import verify as module
from megapoly.checkpoints.run_file import run_text
from megapoly.checkpoints.verify import Ranks, Verdict, verify


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "iter_0000006")


def files(checkpoint: Path) -> list[Path]:
    found = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    assert len(found) == 8
    return found


def test_a_whole_checkpoint_is_whole(checkpoint: Path) -> None:
    verdict = verify(checkpoint)
    assert not verdict.damages and verdict.is_sealed
    assert verdict.files == (
        "run.json",
        *sorted(
            path.relative_to(checkpoint).as_posix()
            for path in files(checkpoint)
            if path.name != "run.json"
        ),
    )


def test_every_flip_of_a_bit_and_every_truncation_is_found(checkpoint: Path) -> None:
    """400 flips over all kinds of files, zip headers and padding included, and 80 truncations."""
    rng = random.Random(1)
    for path in files(checkpoint):
        name, data = path.relative_to(checkpoint).as_posix(), path.read_bytes()
        for _ in range(50):
            changed, at = bytearray(data), rng.randrange(len(data))
            changed[at] ^= 1 << rng.randrange(8)
            path.write_bytes(changed)
            assert [file for file, _ in verify(checkpoint).damages] == [name], (name, at)
        for length in (0, len(data) - 1, *(rng.randrange(len(data)) for _ in range(8))):
            path.write_bytes(data[:length])
            assert [file for file, _ in verify(checkpoint).damages] == [name], (name, length)
        path.write_bytes(data)
    assert not verify(checkpoint).damages


def test_every_byte_of_run_json_is_proven(checkpoint: Path) -> None:
    """Also those of white space, of names, and of the CRC-32 itself; a random bit of each."""
    rng = random.Random(1)
    path = checkpoint / "run.json"
    data = path.read_bytes()
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :])
        with pytest.raises(module.DamageError):
            module.sealed_files(module.read_run_file(checkpoint))


def is_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def zeros_in_the_middle(path: Path) -> None:
    data = path.read_bytes()
    middle = len(data) // 2
    path.write_bytes(data[:middle] + bytes(len(data[middle : middle + 8])) + data[middle + 8 :])


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (Path.unlink, "is missing"),
        (is_a_folder, "is a folder"),
        (zeros_in_the_middle, "is damaged"),
        (longer, ""),
    ],
)
def test_odd_files_are_named(checkpoint: Path, damage: Callable[[Path], None], reason: str) -> None:
    for path in files(checkpoint):
        copy = checkpoint.with_name("copy")
        shutil.copytree(checkpoint, copy)
        name = path.relative_to(checkpoint).as_posix()
        damage(copy / name)
        (found,) = verify(copy).damages
        assert found[0] == name and reason in found[1], found
        shutil.rmtree(copy)


def test_a_file_that_cannot_be_opened_is_named(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fails; an unreadable file would be readable for root."""
    open_file = Path.open

    def fail(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self.name == "common.pt":
            raise OSError(5, "Input/output error")
        return open_file(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", fail)
    assert verify(checkpoint).damages == (("common.pt", "cannot be read (Input/output error)"),)


def test_files_outside_of_the_folder_are_not_opened(checkpoint: Path) -> None:
    run = module.read_run_file(checkpoint)
    run["files"]["../other"] = {"bytes": 0, "crc32": "00000000"}
    (checkpoint / "run.json").write_text(run_text(run))
    (found,) = verify(checkpoint).damages
    assert found == ("run.json", "names `../other`, which is not in the checkpoint's folder")


def test_a_checkpoint_without_sizes_and_crcs_is_not_called_whole(checkpoint: Path) -> None:
    (checkpoint / "run.json").write_text(json.dumps({"iteration": 6}))
    assert verify(checkpoint) == Verdict(is_sealed=False, files=("run.json",))


def on_ranks(folder: Path, num_ranks: int) -> list[Verdict]:
    """Verify on several ranks, which are threads here."""
    given: list[Any] = [None] * num_ranks
    barrier = threading.Barrier(num_ranks)
    verdicts: list[Any] = [None] * num_ranks

    def work(rank: int) -> None:
        def gather(own: Any) -> list[Any]:
            given[rank] = own
            barrier.wait()
            return list(given)

        verdicts[rank] = verify(folder, Ranks(rank, num_ranks, gather))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return verdicts


@pytest.mark.parametrize("num_ranks", [2, 3, 7])
def test_all_ranks_agree_and_read_every_byte_once(
    checkpoint: Path, num_ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PIECE_BYTES", 1000)
    monkeypatch.setattr(module, "_BUFFER_BYTES", 300)
    sizes = {
        path.relative_to(checkpoint).as_posix(): (path.stat().st_size, "")
        for path in files(checkpoint)
    }
    pieces = [piece for rank in range(num_ranks) for piece in module._share(sizes, rank, num_ranks)]
    for name, (size, _) in sizes.items():
        position = 0
        for piece in sorted((p for p in pieces if p.file == name), key=lambda p: p.start):
            assert piece.start == position
            position += piece.num_bytes
        assert position == size
    assert set(on_ranks(checkpoint, num_ranks)) == {verify(checkpoint)}
    rng = random.Random(num_ranks)
    for path in files(checkpoint):
        data = path.read_bytes()
        at = rng.randrange(len(data))
        path.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        (verdict,) = set(on_ranks(checkpoint, num_ranks))
        assert [file for file, _ in verdict.damages] == [path.relative_to(checkpoint).as_posix()]
        path.write_bytes(data)
