"""Token files compared with manifest and vocabulary; test_token_files.py checks sizes."""

from dataclasses import replace

import numpy as np
import pytest

from megapoly.data import token_file_checks
from megapoly.data.index_file import write_index
from megapoly.data.manifest import (
    Manifest,
    PairRecord,
    RejectedRecord,
    TokenizerRecord,
    manifest_path,
    read_manifest,
    write_manifest,
)
from megapoly.data.token_file_checks import check_token_files
from megapoly.data.token_files import (
    TokenFile,
    open_token_file,
    sha256_of,
    token_counts,
    write_token_file,
)
from megapoly.errors import DataError

NAME = "text_text_document"


@pytest.fixture
def check(tmp_path, tokenizer):
    def run(name: str = NAME, *, vocab_size: int = 4096, min_tokens: int = 33, **changes):
        arguments = {"tokenizer": tokenizer.fingerprint, "cache_dir": tmp_path / "cache"}
        arguments |= {"vocab_size": vocab_size, "min_tokens": min_tokens}
        return check_token_files([tmp_path / name], **(arguments | changes))

    return run


@pytest.fixture
def written(tmp_path, texts, tokenizer):
    """Write a pair with its manifest; return the highest id, computed by hand."""
    prefix = tmp_path / NAME
    write_token_file(prefix, texts, tokenizer)
    token_file = open_token_file(prefix)
    highest = int(np.fromfile(f"{prefix}.bin", np.uint16).max())
    bin_path, idx_path = tmp_path / f"{NAME}.bin", tmp_path / f"{NAME}.idx"
    record = PairRecord(
        NAME,
        "uint16",
        len(texts),
        len(texts),
        token_file.num_tokens,
        highest,
        0,
        {},
        bin_path.stat().st_size,
        sha256_of(bin_path),
        idx_path.stat().st_size,
        sha256_of(idx_path),
    )
    made_by = TokenizerRecord("HF", "t.json", tokenizer.fingerprint, 4096, 0, True, [], [], "x 1")
    write_manifest(
        tmp_path / "text", Manifest(1, "0.1", made_by, {}, [], [record], RejectedRecord("fail"))
    )
    return highest


def rewrite(tmp_path, **changes):
    """Write the manifest with another record of the pair, or another tokenizer."""
    manifest = read_manifest(manifest_path(tmp_path / "text"))
    sha256 = changes.pop("tokenizer_sha256", manifest.tokenizer.sha256)
    write_manifest(
        tmp_path / "text",
        replace(
            manifest,
            pairs=[replace(manifest.pairs[0], **changes)],
            tokenizer=replace(manifest.tokenizer, sha256=sha256),
        ),
    )


def test_a_pair_that_is_what_its_manifest_says(written, check, tmp_path):
    (token_file,), warnings = check()
    assert (token_file.prefix, warnings) == (str(tmp_path / NAME), [])
    assert not (tmp_path / "cache").exists()  # nothing had to be read for the highest id
    check(vocab_size=written + 1)
    with pytest.raises(
        DataError, match=rf"vocabulary \({written}\).*text.manifest.*holds {written}"
    ):
        check(vocab_size=written)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"bin_bytes": 10},
            r"document.bin` has \d+ bytes, but its manifest .* says 10\. It was truncated",
        ),
        (
            {"idx_bytes": 11},
            r"document.idx` has \d+ bytes, but its manifest .* says 11\. It was truncated",
        ),
        ({"idx_sha256": "ab" * 32}, r"document.idx` has SHA-256 \w{64}, .* says abab.* again, or"),
    ],
)
def test_a_pair_that_is_not_what_its_manifest_says(written, check, tmp_path, changes, message):
    rewrite(tmp_path, **changes)
    with pytest.raises(DataError, match=message):
        check()
    manifest_path(tmp_path / "text").unlink()
    check()


def test_another_file_of_the_same_sizes_is_noticed(written, check, tmp_path, texts, tokenizer):
    """Two documents are swapped: the sizes are the same, the index is not."""
    write_token_file(tmp_path / NAME, texts[::-1], tokenizer)
    with pytest.raises(DataError, match="idx` has SHA-256"):
        check()


def test_another_tokenizer_is_a_warning(written, check, tmp_path, tokenizer):
    rewrite(tmp_path, tokenizer_sha256="cd" * 32)
    _, (warning,) = check()
    assert "another tokenizer.json" in warning and "cdcdcdcdcdcd.." in warning
    assert tokenizer.fingerprint[:12] in warning


def test_without_a_manifest_ids_are_read(written, check, tmp_path, monkeypatch):
    manifest_path(tmp_path / "text").unlink()
    check(vocab_size=written + 1)
    with pytest.raises(DataError, match=rf"vocabulary \({written}\).*bin` holds {written}\. Set"):
        check(vocab_size=written)
    # The result is kept: the file is not read again.
    monkeypatch.setattr(token_file_checks, "_extremes_of_blocks", None)
    check(vocab_size=written + 1)


@pytest.mark.parametrize(
    ("place", "is_seen"),
    [(0, True), (1539, True), (24, True), (31, True), (8, False), (23, False), (32, False)],
)
def test_the_sample_of_a_large_file_is_spread_over_it(tmp_path, monkeypatch, place, is_seen):
    """64 blocks of 8 tokens begin every (1540 - 8) / 63 = 24.3 tokens: 0 to 7, 24 to 31, .."""
    monkeypatch.setattr(token_file_checks, "_BLOCK_BYTES", 16)
    ids = np.zeros(1540, np.uint16)
    ids[place] = 999
    ids.tofile(tmp_path / "x.bin")
    token_file = TokenFile(str(tmp_path / "x"), np.dtype(np.uint16), 1, 1540, "", "")
    assert token_file_checks._extremes_of_blocks(token_file) == (0, 999 if is_seen else 0)


@pytest.mark.parametrize("dtype", [np.int16, np.int32])
def test_negative_ids(check, tmp_path, dtype):
    """Without a manifest they are found before a model is built, whatever the highest id is."""
    ids = np.arange(40, dtype=dtype)
    ids[7] = -5
    write_pair(tmp_path / "foreign", ids)
    with pytest.raises(
        DataError, match=r"must not be negative; `.*foreign.bin` holds -5 \(int"
    ) as e:
        check("foreign")
    assert ("too large for int16: write them as uint16 or int32" in str(e.value)) == (
        dtype == np.int16
    )
    with pytest.raises(DataError, match=r"must not be negative; .* holds -5"):
        token_counts(tmp_path / "foreign")


def write_pair(prefix, ids):
    """Write one document of a foreign program."""
    ids.tofile(f"{prefix}.bin")
    with open(f"{prefix}.idx", "wb") as stream:
        write_index(
            stream,
            ids.dtype,
            num_sequences=1,
            num_documents=1,
            lengths=lambda: [np.array([len(ids)])],
            sequences_per_document=lambda: [np.ones(1, np.int64)],
        )


def test_a_cache_without_the_lowest_id_is_read_again(written, check, tmp_path):
    manifest_path(tmp_path / "text").unlink()
    check()
    (kept,) = (tmp_path / "cache" / "token_ids").iterdir()
    both = kept.read_text()
    kept.write_text('{"highest_sampled_id": 3}')
    check()
    assert kept.read_text() == both


def test_a_file_too_short_for_a_sample_is_refused(check, tokenizer, tmp_path):
    text = tokenizer.decode([tokenizer.encode(" whale")[0]] * 31)
    write_token_file(tmp_path / "short", [text], tokenizer)
    check("short", min_tokens=32)
    with pytest.raises(DataError, match="at least 33 tokens.*short` has 32.*`training.seq_length`"):
        check("short", min_tokens=33)
