"""Readers of Parquet and Arrow files, and of text files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megapoly.data.preprocess.text_extraction import BadRecord, RecordRules, Rejection, TextBatch
from megapoly.errors import DataError
from megapoly.platform import extras

if TYPE_CHECKING:
    import pyarrow

_ROWS_AT_ONCE = 512
_BYTE_ORDER_MARK = "\ufeff"


def num_row_groups(path: Path) -> int:
    """Return the number of row groups of a Parquet file.

    Raises:
        DataError: it is not a Parquet file, or is truncated.
    """
    return int(_parquet(path).num_row_groups)


def num_rows_before(path: Path, group: int) -> int:
    """Return the number of rows of a Parquet file before a row group."""
    metadata = _parquet(path).metadata
    return sum(metadata.row_group(i).num_rows for i in range(group))


def read_parquet(
    path: Path, first_group: int, end_group: int, rules: RecordRules
) -> Iterator[TextBatch]:
    """Yield batches of the rows of some row groups.

    Raises:
        DataError: a column is missing or does not hold text.
    """
    file = _parquet(path)
    _check_columns(path, file.schema_arrow, rules)
    row = 0
    for group in range(first_group, end_group):
        group_bytes = sum(
            file.metadata.row_group(group).column(i).total_compressed_size
            for i in range(file.metadata.num_columns)
        )
        num_rows = file.metadata.row_group(group).num_rows
        for rows in _batches(path, file, group, rules):
            batch = _rows_of(rows, row, rules)
            batch.source_bytes = group_bytes * rows.num_rows // max(1, num_rows)
            row += rows.num_rows
            yield batch


def _batches(path: Path, file: Any, group: int, rules: RecordRules) -> Iterator[Any]:
    """Yield the rows of a row group, some at a time."""
    try:
        yield from file.iter_batches(_ROWS_AT_ONCE, [group], list(rules.keys))
    except (_import_pyarrow().ArrowException, OSError) as error:
        raise DataError(
            f"`{path}` has a row group ({group}) that cannot be read: {error}. It is damaged: copy "
            "or create it again."
        ) from error


def read_arrow(path: Path, position: int, rules: RecordRules) -> Iterator[TextBatch]:
    """Yield batches of the record batches of an Arrow stream or file, starting at a position.

    ``TextBatch.position`` is the number of record batches so far, set at the end of each.

    Raises:
        DataError: it is neither, or a column is missing or does not hold text.
    """
    pyarrow = _import_pyarrow()
    size = path.stat().st_size
    try:
        source = pyarrow.memory_map(str(path))
        record_batches = _arrow_batches(pyarrow, source)
        schema, number = next(record_batches), 0
        _check_columns(path, schema, rules)
        row = consumed = 0
        for number, rows in enumerate(record_batches, 1):
            if number > position:
                for start in range(0, rows.num_rows, _ROWS_AT_ONCE):
                    part = rows.select(list(rules.keys)).slice(start, _ROWS_AT_ONCE)
                    batch = _rows_of(part, row, rules)
                    batch.source_bytes = rows.nbytes * part.num_rows // max(1, rows.num_rows)
                    batch.source_bytes = min(batch.source_bytes, size - consumed)
                    consumed += batch.source_bytes
                    if start + part.num_rows == rows.num_rows:
                        batch.position = number
                    row += part.num_rows
                    yield batch
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"`{path}` is not an Arrow file that can be read: {error}") from error


def read_text(path: Path, rules: RecordRules) -> Iterator[TextBatch]:
    """Yield a text file as one document."""
    size = path.stat().st_size
    batch = TextBatch([[] for _ in rules.keys], num_rows=1, source_bytes=size)
    content = None
    try:
        if size > rules.max_document_bytes:
            raise rules.too_large(size)
        content = path.read_bytes()
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadRecord("invalid UTF-8", f"byte {error.start}") from error
        text = rules.check_text("text", text.removeprefix(_BYTE_ORDER_MARK))
        for column in batch.texts:
            column.append(text)
    except BadRecord as bad:
        batch.rejected.append(Rejection(0, bad.reason, bad.detail, content, size))
    yield batch


def _import_pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise extras.unavailable("Reading Parquet and Arrow files", "data", ["pyarrow"]) from error
    return pyarrow


def _parquet(path: Path) -> Any:
    pyarrow = _import_pyarrow()
    try:
        return pyarrow.parquet.ParquetFile(path, memory_map=True)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"`{path}` is not a Parquet file that can be read: {error}") from error


def _arrow_batches(pyarrow: Any, source: Any) -> Iterator[Any]:
    """Yield the schema, then the record batches of an IPC file or stream (from ``datasets``)."""
    if source.read(6) == b"ARROW1":
        reader = pyarrow.ipc.open_file(source)
        yield reader.schema
        yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
    else:
        source.seek(0)
        reader = pyarrow.ipc.open_stream(source)
        yield reader.schema
        yield from reader


def _check_columns(path: Path, schema: pyarrow.Schema, rules: RecordRules) -> None:
    types = _import_pyarrow().types
    text_kinds = (
        types.is_string,
        types.is_large_string,
        types.is_string_view,
        types.is_binary,
        types.is_large_binary,
    )
    for key in rules.keys:
        if schema.names.count(key) > 1:
            raise DataError(f"`{path}` must have one column `{key}`; it has several.")
        if key not in schema.names:
            raise DataError(
                f"`{path}` must have the column `{key}`; it has {', '.join(schema.names)}. Name "
                "another with `--json-keys`."
            )
        kind = schema.field(key).type
        if types.is_dictionary(kind):
            kind = kind.value_type
        if not any(is_kind(kind) for is_kind in text_kinds):
            raise DataError(f"The column `{key}` of `{path}` must be of strings; it is of {kind}.")


def _rows_of(rows: Any, first_row: int, rules: RecordRules) -> TextBatch:
    """Return the texts of a record batch, which has the columns of the rules."""
    pyarrow = _import_pyarrow()
    batch = TextBatch([[] for _ in rules.keys], num_rows=rows.num_rows)
    columns = [
        _as_bytes(pyarrow, rows.column(rows.schema.get_field_index(key))) for key in rules.keys
    ]
    for row, values in enumerate(zip(*columns, strict=True), first_row):
        contents = [value.as_py() for value in values]
        try:
            texts = [
                _text(key, content, rules)
                for key, content in zip(rules.keys, contents, strict=True)
            ]
        except BadRecord as bad:
            kept = [c for c in contents if c is not None and len(c) <= rules.max_document_bytes]
            size = sum(len(content or b"") for content in contents)
            batch.rejected.append(
                Rejection(row, bad.reason, bad.detail, kept[0] if kept else None, size)
            )
            continue
        for column, text in zip(batch.texts, texts, strict=True):
            column.append(text)
    return batch


def _as_bytes(pyarrow: Any, column: Any) -> Any:
    """Return a column of strings as bytes, after checking that they are in the file's buffers.

    Bytes, since a string column may hold invalid UTF-8, and reading it as strings raises for all.
    An Arrow file says where each string begins, and pyarrow reads there unless it is told to check.

    Raises:
        pyarrow.ArrowException: an offset or an index leads elsewhere.
    """
    column.validate()  # buffers are long enough for what follows
    if pyarrow.types.is_dictionary(column.type):
        return _as_bytes(pyarrow, column.dictionary).take(column.indices)
    if pyarrow.types.is_string_view(column.type):
        column = column.cast(pyarrow.binary_view())
        column.validate(full=True)
    converted = column.cast(pyarrow.large_binary())
    converted.validate(full=True)
    return converted


def _text(key: str, content: bytes | None, rules: RecordRules) -> str:
    if content is None:
        return rules.check_text(key, None)
    if len(content) > rules.max_document_bytes:
        raise rules.too_large(len(content))
    try:
        return rules.check_text(key, content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRecord("invalid UTF-8", f"byte {error.start}") from error
