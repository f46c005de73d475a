import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from megapoly.data.preprocess import columnar
from megapoly.data.preprocess.columnar import read_arrow, read_parquet, read_text
from megapoly.data.preprocess.text_extraction import RecordRules
from megapoly.errors import DataError


def table(**columns) -> pyarrow.Table:
    return pyarrow.table(columns)


def write_arrow(path, contents: pyarrow.Table, *, stream=True, rows=7) -> None:
    opened = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
    with pyarrow.OSFile(str(path), "wb") as sink, opened(sink, contents.schema) as writer:
        writer.write_table(contents, max_chunksize=rows)


def texts_of(blocks) -> list[str]:
    return [text for block in blocks for text in block.texts[0]]


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(columnar, "_ROWS_AT_ONCE", 3)


KINDS = [
    pyarrow.string(),
    pyarrow.large_string(),
    pyarrow.binary(),
    pyarrow.string_view(),
    pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_tables_give_their_texts(tmp_path, texts, rules, kind):
    contents = table(id=list(range(len(texts))), text=pyarrow.array(texts).cast(kind))
    pyarrow.parquet.write_table(contents, tmp_path / "a.parquet", row_group_size=11)
    groups = -(-len(texts) // 11)
    found = []
    for first in range(0, groups, 2):
        found += read_parquet(tmp_path / "a.parquet", first, min(first + 2, groups), rules)
    assert texts_of(found) == texts

    for stream in (True, False):
        write_arrow(tmp_path / "a.arrow", contents, stream=stream)
        blocks = list(read_arrow(tmp_path / "a.arrow", 0, rules))
        assert texts_of(blocks) == texts
        ends = [i for i, block in enumerate(blocks) if block.position is not None]
        assert 5 < len(ends) < len(blocks)
        for i in ends:
            rest = read_arrow(tmp_path / "a.arrow", blocks[i].position, rules)
            assert texts_of(rest) == texts_of(blocks[i + 1 :])


def test_bad_rows_are_named_and_those_beside_them_kept(tmp_path):
    rules = RecordRules(("text",), keep_empty=False, max_document_bytes=20)
    values = [b"good", None, b"", b"a\xff", b"x" * 21, b"last"]
    # As strings: nothing checks what lies in the file.
    strings = pyarrow.Array.from_buffers(
        pyarrow.string(), len(values), pyarrow.array(values).buffers()
    )
    pyarrow.parquet.write_table(table(text=strings), tmp_path / "a.parquet")
    blocks = list(read_parquet(tmp_path / "a.parquet", 0, 1, rules))
    assert texts_of(blocks) == ["good", "last"]
    assert [(r.row, r.reason, r.content) for b in blocks for r in b.rejected] == [
        (1, "`text` is not a string", None),
        (2, "empty text", b""),
        (3, "invalid UTF-8", b"a\xff"),
        (4, "longer than --max-document-mib", None),
    ]


def test_columns_that_are_missing_or_not_of_text_are_refused(tmp_path, rules):
    pyarrow.parquet.write_table(table(content=["a"], n=[1]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="column `text`; it has content, n.*--json-keys"):
        list(read_parquet(tmp_path / "a.parquet", 0, 1, rules))
    write_arrow(tmp_path / "a.arrow", table(text=[1, 2]))
    with pytest.raises(DataError, match="must be of strings; it is of int64"):
        list(read_arrow(tmp_path / "a.arrow", 0, rules))


def test_truncated_tables_are_refused(tmp_path, texts, rules):
    pyarrow.parquet.write_table(table(text=texts), tmp_path / "a.parquet")
    write_arrow(tmp_path / "a.arrow", table(text=texts))
    for name in ("a.parquet", "a.arrow"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="not a Parquet file"):
        list(read_parquet(tmp_path / "a.parquet", 0, 1, rules))
    with pytest.raises(DataError, match="not an Arrow file"):
        list(read_arrow(tmp_path / "a.arrow", 0, rules))


def test_a_text_file_is_a_document(tmp_path, rules):
    path = tmp_path / "a.txt"
    for content, texts, reasons in (
        (b"\xef\xbb\xbfone\ntwo\n", ["one\ntwo\n"], []),
        (b"", [], ["empty text"]),
        (b"a\xff", [], ["invalid UTF-8"]),
        (b"x" * (1 << 20) + b"x", [], ["longer than --max-document-mib"]),
    ):
        path.write_bytes(content)
        (block,) = read_text(path, rules)
        assert block.texts == [texts]
        assert [record.reason for record in block.rejected] == reasons
        assert (block.num_rows, block.source_bytes) == (1, len(content))


def spread_offsets(kind) -> tuple[bytes, bytes, bytes]:
    """Return an Arrow stream with a string of 4 bytes in each row, its offsets, and those moved."""
    rows = pyarrow.array(["abcd"] * 9).cast(kind)
    sink = pyarrow.BufferOutputStream()
    contents = pyarrow.table({"text": rows})
    with pyarrow.ipc.new_stream(sink, contents.schema) as writer:
        writer.write_table(contents)
    dtype = "<i8" if pyarrow.types.is_large_string(kind) else "<i4"
    offsets = np.arange(0, 40, 4, dtype=dtype)
    moved = offsets.copy()
    moved[4] = 1 << 29
    return sink.getvalue().to_pybytes(), offsets.tobytes(), moved.tobytes()


@pytest.mark.parametrize(
    "kind",
    [pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary("int32", "string")],
    ids=str,
)
def test_strings_outside_of_the_file_are_not_read(tmp_path, rules, kind):
    if pyarrow.types.is_dictionary(kind):
        indices = pyarrow.array([0, 7], pyarrow.int32())
        column = pyarrow.DictionaryArray.from_arrays(indices, ["a", "b"], safe=False)
        write_arrow(tmp_path / "a.arrow", pyarrow.table({"text": column}))
    else:
        content, offsets, moved = spread_offsets(kind)
        assert content.count(offsets) == 1
        (tmp_path / "a.arrow").write_bytes(content.replace(offsets, moved))
    with pytest.raises(DataError, match=r"is not an Arrow file that can be read: .*out of bounds"):
        list(read_arrow(tmp_path / "a.arrow", 0, rules))
