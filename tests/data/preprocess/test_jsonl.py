import gzip
import json
import random

import pytest
import zstandard
from token_data import write_jsonl

from megapoly.data.preprocess import jsonl
from megapoly.data.preprocess.jsonl import (
    LineSplitter,
    count_lines_before,
    read_compressed,
    read_line_range,
)
from megapoly.data.preprocess.text_extraction import OversizedLine, RecordRules

COMPRESS = {"jsonl.gz": gzip.compress, "jsonl.zst": zstandard.compress}


@pytest.fixture(autouse=True)
def small_reads(monkeypatch):
    """Make lines and frames cross the boundaries of reads."""
    monkeypatch.setattr(jsonl, "READ_BYTES", 512)
    monkeypatch.setattr(jsonl, "_GZIP_READ_BYTES", 128)
    monkeypatch.setattr(jsonl, "_ZSTD_READ_BYTES", 100)


def texts_of(blocks) -> list[str]:
    return [text for block in blocks for text in block.texts[0]]


@pytest.mark.parametrize("limit", [5, 1000])
def test_splitter_cuts_as_bytes_split_does(limit):
    random.seed(limit)
    for _ in range(200):
        data = bytes(random.choice(b"ab\n") for _ in range(random.randint(0, 60)))
        splitter, lines, fed = LineSplitter(limit), [], 0
        while fed < len(data):
            size = random.randint(1, 20)
            lines += splitter.feed(data[fed : fed + size])
            fed += size
            assert splitter.num_pending == len(data[:fed].split(b"\n")[-1])
        lines += splitter.end()
        expected = data.split(b"\n")
        expected = expected[:-1] if expected[-1] == b"" else expected
        assert lines == [x if len(x) <= limit else OversizedLine(len(x)) for x in expected]


@pytest.mark.parametrize("ending", ["", "\n", "\n\n"])
def test_ranges_give_every_line_once(tmp_path, texts, rules, ending):
    path = write_jsonl(tmp_path / "a.jsonl", texts[:40])
    path.write_text(path.read_text().rstrip("\n") + ending)
    size = path.stat().st_size
    for step in (1, 97, 512, 2000, size):
        if step == 1:
            starts = sorted({0, *range(0, size, 37), *range(600, 700)})
        else:
            starts = list(range(0, size, step))
        found, rows = [], 0
        for start, end in zip(starts, [*starts[1:], size], strict=True):
            assert count_lines_before(path, start) == rows
            blocks = list(read_line_range(path, start, end, rules))
            found += texts_of(blocks)
            rows += sum(block.num_rows for block in blocks)
        assert found == texts[:40]


@pytest.mark.parametrize("format_", COMPRESS)
def test_streams_give_the_lines_and_resume_from_every_position(tmp_path, texts, rules, format_):
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    content = path.read_bytes()
    compress = COMPRESS[format_]
    # Members or frames that end inside a line, as from a parallel compressor.
    parts = [content[i : i + 3000] for i in range(0, len(content), 3000)]
    path.write_bytes(b"".join(map(compress, parts)))
    blocks = list(read_compressed(path, format_, 0, rules))
    assert texts_of(blocks) == texts and len(blocks) > 20
    assert sum(block.source_bytes for block in blocks) == path.stat().st_size
    for i in range(0, len(blocks), 7):
        position = blocks[i].position
        assert position == 0 or content[position - 1 : position] == b"\n"
        rest = read_compressed(path, format_, position, rules)
        assert texts_of(rest) == texts_of(blocks[i + 1 :])


@pytest.mark.parametrize("format_", COMPRESS)
@pytest.mark.parametrize("kept", [0, 30, 0.5, -1])
def test_truncated_streams_end_with_what_is_lost(tmp_path, texts, rules, format_, kept):
    content = COMPRESS[format_](write_jsonl(tmp_path / "a.jsonl", texts).read_bytes())
    path = tmp_path / "a"
    kept = int(len(content) * kept) if isinstance(kept, float) else kept
    path.write_bytes(content[:kept])
    blocks = list(read_compressed(path, format_, 0, rules))
    found = texts_of(blocks)
    (record,) = [record for block in blocks for record in block.rejected]
    assert record.reason == f"truncated {'gzip' if format_.endswith('gz') else 'zstd'}"
    assert f"after {path.stat().st_size:,} bytes" in record.detail
    assert found == texts[: len(found)]
    assert record.row == len(found) == sum(block.num_rows for block in blocks) - 1


def test_corrupt_gzip_ends_with_what_is_lost(tmp_path, texts, rules):
    content = bytearray(gzip.compress(write_jsonl(tmp_path / "a", texts).read_bytes()))
    content[len(content) // 2] ^= 255
    (tmp_path / "a").write_bytes(content)
    blocks = list(read_compressed(tmp_path / "a", "jsonl.gz", 0, rules))
    assert [r.reason for b in blocks for r in b.rejected][-1] == "corrupt gzip"
    assert 0 < len(texts_of(blocks)) < len(texts)


def test_a_byte_order_mark_and_windows_line_ends(tmp_path, rules):
    content = b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b"}\r\n'
    (tmp_path / "a").write_bytes(content)
    assert texts_of(read_line_range(tmp_path / "a", 0, len(content), rules)) == ["a", "b"]
    (tmp_path / "a").write_bytes(gzip.compress(content))
    assert texts_of(read_compressed(tmp_path / "a", "jsonl.gz", 0, rules)) == ["a", "b"]


@pytest.mark.parametrize("format_", ["jsonl", *COMPRESS])
def test_a_huge_line_is_not_kept_in_memory(tmp_path, monkeypatch, format_):
    monkeypatch.setattr(jsonl, "READ_BYTES", 1 << 16)
    rules = RecordRules(("text",), keep_empty=False, max_document_bytes=10_000)
    lines = [json.dumps({"text": text}) for text in ("a", "b" * 5_000_000, "c")]
    content = "\n".join(lines).encode()
    (tmp_path / "a").write_bytes(COMPRESS.get(format_, bytes)(content))
    kept = []

    class Watched(LineSplitter):
        def feed(self, data):
            lines = super().feed(data)
            kept.append(len(self._pending))
            return lines

    monkeypatch.setattr(jsonl, "LineSplitter", Watched)
    if format_ == "jsonl":
        pieces = [(0, 2_000_000), (2_000_000, 4_000_000), (4_000_000, len(content))]
        blocks = [b for a, z in pieces for b in read_line_range(tmp_path / "a", a, z, rules)]
    else:
        blocks = list(read_compressed(tmp_path / "a", format_, 0, rules))
    assert texts_of(blocks) == ["a", "c"]
    (record,) = [record for block in blocks for record in block.rejected]
    assert record.size_bytes == len(lines[1]) and record.content is None
    assert max(kept) <= 10_000
