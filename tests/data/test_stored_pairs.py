"""Token files in a store: the samples of the local files, copied once, verified, or a sentence."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch

from megapoly.config.schema import Config, DataConfig, TrainingConfig
from megapoly.data.corpus import Corpus, load_corpus
from megapoly.data.manifest import Manifest, PairRecord, RejectedRecord, write_manifest
from megapoly.data.stored_pairs import StoredPairs
from megapoly.data.token_files import open_token_file, sha256_of, write_token_file
from megapoly.errors import DataError, UnavailableError
from megapoly.platform import stores

NAMES = ("a_text_document", "b_text_document")


@pytest.fixture
def local(tmp_path, texts, tokenizer) -> Path:
    """Two pairs with a manifest each, on disk."""
    folder = tmp_path / "local"
    for name, part in zip(NAMES, (texts[:5], texts[3:]), strict=True):
        write_token_file(folder / name, part, tokenizer)
        found = open_token_file(folder / name)
        bin_path, idx_path = folder / f"{name}.bin", folder / f"{name}.idx"
        highest = int(np.fromfile(bin_path, found.dtype).max())
        counts = (len(part), len(part), found.num_tokens, highest, 0)
        hashes = [v for p in (bin_path, idx_path) for v in (p.stat().st_size, sha256_of(p))]
        record = PairRecord(name, found.dtype.name, *counts, {}, *hashes)
        manifest = Manifest(1, "0.1", None, {}, [], [record], RejectedRecord("fail"))
        write_manifest(folder / name.removesuffix("_document"), manifest)
    return folder


@pytest.fixture(params=("memory://bucket/{}", "file://{}"))
def url(request: pytest.FixtureRequest, tmp_path: Path, local: Path) -> str:
    """Return the URL of a copy of the folder in a store."""
    url = str(request.param).format(tmp_path / "store")
    store, root = fsspec.url_to_fs(url)
    store.makedirs(root, exist_ok=True)
    for path in local.iterdir():
        store.put_file(str(path), f"{root}/{path.name}")
    return url


def opened(tmp_path: Path, tokenizer, blend: list[str], **arguments) -> Corpus:
    data = DataConfig(blend=blend, validation={"v": blend[:1]}, cache_dir=str(tmp_path / "cache"))
    config = Config(run_dir=str(tmp_path), data=data, training=TrainingConfig(seq_length=32))
    return load_corpus(config, tokenizer=tokenizer, **arguments)


def assert_same_samples(one: Corpus, two: Corpus) -> None:
    assert one.fingerprint == two.fingerprint
    pools = [source.pool for source in one.train.sources] + [one.validation["v"]]
    others = [source.pool for source in two.train.sources] + [two.validation["v"]]
    for pool, other in zip(pools, others, strict=True):
        assert len(pool) == len(other) > 10
        for index in range(len(pool)):
            for key, value in pool[index].items():
                assert torch.equal(value, other[index][key]), key


@pytest.mark.parametrize("paths", [NAMES, ["*_text_document"]])
def test_samples_are_those_of_the_local_files(paths, tmp_path, local, url, tokenizer):
    expected = opened(tmp_path, tokenizer, [f"{local}/{path}" for path in paths])
    stored = opened(tmp_path / "other", tokenizer, [f"{url}/{path}" for path in paths])
    assert_same_samples(expected, stored)
    assert [source["path"] for source in stored.description["sources"]] == [
        f"{url}/{path}" for path in paths
    ]


def test_a_pair_is_copied_once_and_again_when_it_changes(
    tmp_path, local, url, tokenizer, monkeypatch
):
    store, root = fsspec.url_to_fs(url)
    copied: list[str] = []
    get_file = type(store).get_file

    def counted(self: Any, source: str, target: str, **kwargs: Any) -> None:
        copied.append(Path(source).name)
        get_file(self, source, target, **kwargs)

    monkeypatch.setattr(type(store), "get_file", counted)
    blend = [f"{url}/{name}" for name in NAMES]
    opened(tmp_path, tokenizer, blend)
    files = [f"{name}{ending}" for name in NAMES for ending in (".bin", ".idx")]
    assert copied == files
    opened(tmp_path, tokenizer, blend)
    assert copied == files

    copy = next((tmp_path / "cache").rglob(files[0]))
    copy.write_bytes(copy.read_bytes()[:-2])  # such as by a disk that was full
    opened(tmp_path, tokenizer, blend)
    assert copied == files + files[:2]
    assert copy.read_bytes() == (local / files[0]).read_bytes()

    tokens = np.fromfile(local / files[0], np.uint16)[::-1]  # of the same size
    store.pipe_file(f"{root}/{files[0]}", tokens.tobytes())
    store.rm_file(f"{root}/a_text.manifest.json")
    opened(tmp_path, tokenizer, blend)
    assert copied == files + 2 * files[:2]
    assert copy.read_bytes() == tokens.tobytes()


def test_ranks_that_do_not_build_ask_no_store(tmp_path, url, tokenizer):
    expected = opened(tmp_path, tokenizer, [f"{url}/*_text_document"])
    store, root = fsspec.url_to_fs(url)
    store.rm(root, recursive=True)

    def first(what: str, build: Any, find: Any = None) -> Any:
        return (find or build)()

    found = opened(tmp_path, tokenizer, [f"{url}/*_text_document"], first=first)
    assert_same_samples(expected, found)


@pytest.mark.parametrize("ending", [".bin", ".idx"])
def test_files_that_are_not_those_of_the_manifest_are_not_used(ending, tmp_path, url, tokenizer):
    store, root = fsspec.url_to_fs(url)
    data = bytearray(store.cat_file(f"{root}/{NAMES[1]}{ending}"))
    data[-20] ^= 1
    store.pipe_file(f"{root}/{NAMES[1]}{ending}", bytes(data))
    with pytest.raises(DataError, match=rf"{NAMES[1]}\{ending} has SHA-256 .* its manifest says"):
        opened(tmp_path, tokenizer, [f"{url}/{name}" for name in NAMES])
    assert {path.stem for path in (tmp_path / "cache").rglob("*.bin")} == {NAMES[0]}
    assert not list((tmp_path / "cache").rglob("*.partial"))


def test_a_copy_that_breaks_off_is_not_used(tmp_path, url, tokenizer, monkeypatch):
    store, _ = fsspec.url_to_fs(url)
    with monkeypatch.context() as patch:
        patch.setattr(
            type(store), "get_file", lambda self, source, target, **_: Path(target).write_text("1")
        )
        with pytest.raises(DataError, match=r"bytes, and 1 were copied"):
            opened(tmp_path, tokenizer, [f"{url}/{NAMES[0]}"])
    assert not list((tmp_path / "cache").rglob("*.bin"))
    opened(tmp_path, tokenizer, [f"{url}/{NAMES[0]}"])


def test_what_cannot_be_read_is_said(tmp_path, url, tokenizer, monkeypatch):
    with pytest.raises(DataError, match=r"no_such\.bin: is not in the store .* correct the URL"):
        opened(tmp_path, tokenizer, [f"{url}/no_such"])
    with pytest.raises(DataError, match="nothing in the store matches"):
        opened(tmp_path, tokenizer, [f"{url}/no_such*"])
    with pytest.raises(UnavailableError, match="needs ossfs: pip install ossfs"):
        opened(tmp_path, tokenizer, ["oss://bucket/tokens"])
    store, _ = fsspec.url_to_fs(url)

    def refuse(error: Exception) -> None:
        def info(self: Any, path: str, **_: Any) -> None:
            raise error

        monkeypatch.setattr(type(store), "info", info)
        opened(tmp_path, tokenizer, [f"{url}/{NAMES[0]}"])

    class NoCredentialsError(Exception):
        """As botocore's."""

    for error, said in (
        (PermissionError("Access Denied"), "the store refuses .*Access Denied"),
        (NoCredentialsError("Unable to locate"), "needs credentials .*Unable to locate"),
        (ConnectionError("reset"), "cannot be reached .*reset"),
    ):
        with pytest.raises(DataError, match=said):
            refuse(error)


def test_a_disk_without_room_is_said_before_the_first_copy(tmp_path, url, tokenizer, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    sizes = sum(path.stat().st_size for path in (tmp_path / "local").glob("*_document.*"))
    with pytest.raises(DataError, match=f"need {sizes:,} bytes .* has 1,000 free"):
        opened(tmp_path, tokenizer, [f"{url}/{name}" for name in NAMES])


def test_a_store_that_is_silent_is_not_waited_for(tmp_path, url, monkeypatch):
    store, _ = fsspec.url_to_fs(url)
    end = threading.Event()
    monkeypatch.setattr(type(store), "exists", lambda self, path, **_: end.wait())
    monkeypatch.setattr(stores, "FIRST_ANSWER_S", 0.01)
    monkeypatch.setattr(stores, "_answering", set())
    with pytest.raises(DataError, match="does not answer within 0.01 s"):
        StoredPairs([f"{url}/{NAMES[0]}"], tmp_path).find()
    end.set()


def test_a_copy_stays_in_its_folder(tmp_path):
    local = StoredPairs([], tmp_path).local_prefix("s3://bucket/../../x/../tokens")
    assert local == f"{tmp_path}/stores/s3/bucket/x/tokens"
