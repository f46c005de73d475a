"""Damaged files in the cache are built again; the samples stay the same."""

import json
import shutil

import pytest

from megapoly.data.cache_files import built_once
from megapoly.data.token_file_checks import check_token_files
from megapoly.errors import DataError


def flip(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGES = {
    "flipped": flip,
    "shorter": lambda content: content[:-3],
    "empty": lambda content: b"",
    "other": lambda content: b"\xff" * len(content),
    "pickle": lambda content: b"cposix\nsystem\n(S'exit'\ntR.",
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["documents.npy", "bounds.npy", "sums.json"])
def test_damaged_sample_indices_are_built_again(make_pool, tmp_path, caplog, name, damage):
    whole = make_pool()
    (path,) = (tmp_path / "cache" / "samples").rglob(name)
    content = path.read_bytes()
    expected = [whole[k]["tokens"].tolist() for k in range(len(whole))]
    assert not caplog.records
    path.write_bytes(DAMAGES[damage](content))
    again = make_pool()
    assert [again[k]["tokens"].tolist() for k in range(len(again))] == expected
    assert path.read_bytes() == content
    assert len(caplog.records) == 1 and "is built again" in caplog.text


@pytest.mark.parametrize("name", ["documents.npy", "sums.json"])
def test_a_folder_that_has_the_name_of_a_cached_file_is_named(make_pool, tmp_path, name):
    make_pool()
    (path,) = (tmp_path / "cache" / "samples").rglob(name)
    path.unlink()
    path.mkdir()
    with pytest.raises(DataError, match=rf"{path}\). Move what has this name"):
        make_pool()


def test_files_are_built_once(tmp_path):
    calls = []

    def build():
        calls.append(1)
        (tmp_path / "a").write_text("a")

    for _ in range(3):
        built_once([tmp_path / "a"], tmp_path / "sums.json", build)
    assert len(calls) == 1
    # Without sums, as when the process was killed between the two.
    (tmp_path / "sums.json").unlink()
    built_once([tmp_path / "a"], tmp_path / "sums.json", build)
    assert len(calls) == 2


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"lowest_sampled_id": "0"}', b"\xff"])
def test_damaged_ids_are_sampled_again(prefix, tokenizer, tmp_path, caplog, damage):
    pair = tmp_path / "text"
    for ending in (".bin", ".idx"):
        shutil.copy(f"{prefix}{ending}", f"{pair}{ending}")

    def check():
        check_token_files(
            [pair],
            min_tokens=2,
            tokenizer=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            cache_dir=tmp_path / "cache",
        )

    check()
    (kept,) = (tmp_path / "cache" / "token_ids").iterdir()
    content = json.loads(kept.read_text())
    assert not caplog.records
    kept.write_bytes(damage)
    check()
    assert json.loads(kept.read_text()) == content
    assert "is damaged; it is built again" in caplog.text
