import errno
import math

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megapoly.data.token_files import open_token_file, unigram_entropy, write_token_file
from megapoly.errors import DataError


def write_ids(prefix, documents: list[list[int]], dtype=np.uint16) -> None:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        builder.add_document(np.array(document), [len(document)])
    builder.finalize(f"{prefix}.idx")


def test_the_engine_reads_back_what_the_tokenizer_gave(prefix, texts, tokenizer):
    tokens = IndexedDataset(str(prefix))
    assert len(tokens) == len(texts)
    for written, text in zip(tokens, texts, strict=True):
        assert written.tolist() == [*tokenizer.encode(text), tokenizer.eod]
    token_file = open_token_file(prefix)
    assert token_file.num_sequences == len(texts)
    assert token_file.num_tokens == sum(len(written) for written in tokens)


@pytest.mark.parametrize("ending", ["bin", "idx"])
@pytest.mark.parametrize("change", [-1, -20, 3])
def test_files_of_another_size_are_refused(tmp_path, ending, change):
    write_ids(tmp_path / "text", [list(range(40)), list(range(50))])
    path = tmp_path / f"text.{ending}"
    content = path.read_bytes()
    size = len(content) + change
    path.write_bytes((content + b"\0" * 8)[:size])
    with pytest.raises(DataError, match=rf"text\.{ending}.* has {size} bytes.*{len(content)}"):
        open_token_file(tmp_path / "text")


def test_missing_and_foreign_files_are_refused(tmp_path):
    write_ids(tmp_path / "text", [[1, 2]])
    with pytest.raises(DataError, match=r"without the ending.*text.bin.bin"):
        open_token_file(tmp_path / "text.bin")
    (tmp_path / "text.idx").write_bytes(b"")
    with pytest.raises(DataError, match="not a Megatron index"):
        open_token_file(tmp_path / "text")


@pytest.mark.parametrize(
    ("field", "value"),
    [("length", -1), ("length", 7), ("offset", -2), ("offset", 2**62), ("offset", 12)],
)
def test_an_index_that_leads_out_of_the_file_is_refused(tmp_path, field, value):
    """With a sum of lengths, and so a size of the file, that is right."""
    write_ids(tmp_path / "text", [[1, 2, 3], [4, 5], [6]])
    content = bytearray((tmp_path / "text.idx").read_bytes())
    lengths, offsets = 34, 34 + 3 * 4  # after the header
    if field == "length":
        content[lengths : lengths + 8] = np.array([value, 5 - value], "<i4").tobytes()
    else:
        content[offsets + 8 : offsets + 16] = np.array([value], "<i8").tobytes()
    (tmp_path / "text.idx").write_bytes(content)
    with pytest.raises(DataError, match=r"inside of the .bin file, which has 12 bytes; sequence"):
        open_token_file(tmp_path / "text")


@pytest.mark.parametrize("count", [2**63, 2**64 - 1])
def test_a_header_of_huge_counts_is_refused(tmp_path, count):
    write_ids(tmp_path / "text", [[1, 2, 3]])
    content = bytearray((tmp_path / "text.idx").read_bytes())
    content[18:26] = count.to_bytes(8, "little")
    (tmp_path / "text.idx").write_bytes(content)
    with pytest.raises(DataError, match=f"its header describes {34 + 12 * count + 8 * 2}"):
        open_token_file(tmp_path / "text")


def test_fingerprint_changes_with_lengths_and_with_tokens(tmp_path):
    contents = [[[1, 2, 3], [4]], [[1, 2], [3, 4]], [[1, 2, 3], [5]], [[0, 2, 3], [4]]]
    fingerprints = set()
    for i, documents in enumerate(contents):
        write_ids(tmp_path / str(i), documents)
        fingerprints.add(open_token_file(tmp_path / str(i)).fingerprint)
    assert len(fingerprints) == len(contents)
    write_ids(tmp_path / "copy", contents[0])
    assert open_token_file(tmp_path / "copy").fingerprint in fingerprints


def test_interrupted_writing_leaves_nothing(tmp_path, texts, tokenizer, monkeypatch):
    def interrupted():
        yield from texts * 20  # more than are encoded at once
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_token_file(tmp_path / "text", interrupted(), tokenizer)
    assert list(tmp_path.iterdir()) == []

    def no_index(stream, dtype, **counts):
        assert not list(tmp_path.glob("text*")), "a final name before the end"
        raise OSError(errno.ENOSPC, "disk full")

    with monkeypatch.context() as patch, pytest.raises(DataError, match="No space.*bytes are free"):
        patch.setattr("megapoly.data.token_files.write_index", no_index)
        write_token_file(tmp_path / "text", texts, tokenizer)
    assert list(tmp_path.iterdir()) == []

    write_token_file(tmp_path / "text", texts, tokenizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.bin", "text.idx"]


def test_unigram_entropy(tmp_path, monkeypatch):
    monkeypatch.setattr("megapoly.data.token_files._COUNT_AT_ONCE", 3)
    write_ids(tmp_path / "text", [[0, 0, 0, 0], [7, 7], [2, 5]])
    expected = 0.5 * math.log(2) + 0.25 * math.log(4) + 2 * 0.125 * math.log(8)
    assert unigram_entropy(tmp_path / "text") == pytest.approx(expected)


@pytest.mark.parametrize(
    ("token", "rule"),
    [(-3, "Token ids must not be negative; .* holds -3"), (1 << 26, "ids from 0 to .* it has")],
)
def test_ids_that_cannot_be_are_no_counts(tmp_path, token, rule):
    write_ids(tmp_path / "text", [[0, 5, token]], dtype=np.int32)
    with pytest.raises(DataError, match=rule):
        unigram_entropy(tmp_path / "text")
