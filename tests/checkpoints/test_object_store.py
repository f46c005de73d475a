"""Checkpoints in a store are those of the folder, complete or not there, and verified."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec
import pytest
from made_checkpoints import make_checkpoint

from megapoly.checkpoints import object_store
from megapoly.checkpoints.run_folder import checkpoint_path
from megapoly.commands import copy
from megapoly.errors import CheckpointError, UnavailableError

STORES = ("memory://bucket/{}/run", "file://{}/run")


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(params=STORES)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    fsspec.filesystem("memory").makedirs("/bucket", exist_ok=True)
    return str(request.param).format(tmp_path / "store")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for iteration in (6, 9):
        make_checkpoint(checkpoint_path(tmp_path / "run", iteration))
    return tmp_path / "run"


def test_the_newest_checkpoint_goes_to_a_store_and_back(
    run: Path, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert copy.main([str(checkpoint_path(run, 6)), url]) == 0
    assert copy.main([str(run), url + "/"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{url}/checkpoints/iter_0000006",
        f"{url}/checkpoints/iter_0000009",
    ]
    for source, iteration in ((url, 9), (f"{url}/checkpoints/iter_0000006", 6)):
        assert copy.main([source, str(tmp_path / "again")]) == 0
        again = checkpoint_path(tmp_path / "again", iteration)
        assert contents(again) == contents(checkpoint_path(run, iteration))
    assert copy.main([str(run), url]) == 0  # it is there


def test_an_upload_that_breaks_off_is_not_a_checkpoint(
    run: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    object_store.upload(checkpoint_path(run, 6), url)
    store, _ = fsspec.url_to_fs(url)
    put_file = type(store).put_file

    def broken(self: Any, source: str, target: str, *args: Any, **kwargs: Any) -> None:
        if source.endswith(".metadata"):
            raise ConnectionError("reset by peer")
        put_file(self, source, target, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(type(store), "put_file", broken)
        with pytest.raises(CheckpointError, match="ConnectionError: reset by peer"):
            object_store.upload(checkpoint_path(run, 9), url)
    assert object_store.download(url, tmp_path / "again").name == "iter_0000006"
    object_store.upload(checkpoint_path(run, 9), url)
    assert object_store.download(url, tmp_path / "again").name == "iter_0000009"


def test_damage_is_noticed_on_both_sides(run: Path, url: str, tmp_path: Path) -> None:
    checkpoint = checkpoint_path(run, 6)
    where = object_store.upload(checkpoint, url)
    store, root = fsspec.url_to_fs(where)
    data = bytearray(store.cat_file(f"{root}/__0_0.distcp"))
    data[len(data) // 2] ^= 1
    store.pipe_file(f"{root}/__0_0.distcp", bytes(data))
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp is damaged"):
        object_store.download(where, tmp_path / "again")
    assert not list((tmp_path / "again/checkpoints").iterdir())

    (checkpoint_path(run, 9) / "__0_0.distcp").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp"):
        object_store.upload(checkpoint_path(run, 9), url)


def test_names_in_a_store_do_not_leave_the_folder(run: Path, url: str, tmp_path: Path) -> None:
    from megapoly.checkpoints.run_file import read_run_file, run_text

    checkpoint = checkpoint_path(run, 6)
    where = object_store.upload(checkpoint, url)
    content = read_run_file(checkpoint)
    content["files"]["../../escaped"] = content["files"]["config.yaml"]
    store, root = fsspec.url_to_fs(where)
    store.pipe_file(f"{root}/run.json", run_text(content).encode())
    with pytest.raises(CheckpointError, match="not in the checkpoint's folder"):
        object_store.download(where, tmp_path / "again")
    assert not list(tmp_path.rglob("escaped"))


def test_what_cannot_be_copied_is_said(
    run: Path, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CheckpointError, match="has no complete checkpoint"):
        object_store.download(url, tmp_path / "again")
    with pytest.raises(UnavailableError, match="needs ossfs: pip install ossfs"):
        object_store.download("oss://bucket/run", tmp_path / "again")
    with pytest.raises(CheckpointError, match="/none cannot be seen; make it"):
        object_store.upload(checkpoint_path(run, 6), "memory://none/run")
    assert copy.main([str(run), str(tmp_path)]) == 2
    assert "must be a URL" in capsys.readouterr().err
    object_store.upload(checkpoint_path(run, 9), url)
    (checkpoint_path(run, 6)).rename(tmp_path / "iter_0000009")
    with pytest.raises(CheckpointError, match="is another checkpoint"):
        object_store.upload(tmp_path / "iter_0000009", url)
