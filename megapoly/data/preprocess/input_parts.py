"""Split the input into parts that do not depend on the number of workers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from megapoly.data.preprocess.columnar import (
    num_row_groups,
    num_rows_before,
    read_arrow,
    read_parquet,
    read_text,
)
from megapoly.data.preprocess.jsonl import count_lines_before, read_compressed, read_line_range
from megapoly.data.preprocess.source_files import SourceFile
from megapoly.data.preprocess.text_extraction import RecordRules, TextBatch

# Formats that are read from the beginning: one worker reads such a file, and an interrupted part
# can resume inside it.
STREAMS = ("jsonl.gz", "jsonl.zst", "arrow")


@dataclass(frozen=True)
class FileRange:
    """A range of a file: bytes of ``jsonl``, row groups of ``parquet``, otherwise the whole file.

    Args:
        source: index of the file in the list of source files.
        start: first byte or row group.
        end: end of the range, exclusive.
    """

    source: int
    start: int
    end: int


@dataclass(frozen=True)
class InputPart:
    """The unit of work of a worker: consecutive ranges of the input.

    Args:
        index: number of the part.
        ranges: one range, or several small files.
        size_bytes: approximate size on disk.
        whole_sources: files that are completely in this part.
    """

    index: int
    ranges: tuple[FileRange, ...]
    size_bytes: int
    whole_sources: frozenset[int] = frozenset()


def split_into_parts(sources: Sequence[SourceFile], part_bytes: int) -> list[InputPart]:
    """Return parts of about ``part_bytes`` bytes, in the order of the input.

    Raises:
        DataError: a Parquet file cannot be read.
    """
    assert part_bytes >= 16, "a part holds more than a byte-order mark"
    parts: list[InputPart] = []
    pending: list[FileRange] = []
    pending_bytes = 0

    def close() -> None:
        nonlocal pending, pending_bytes
        if pending:
            parts.append(InputPart(len(parts), tuple(pending), pending_bytes))
        pending, pending_bytes = [], 0

    for number, source in enumerate(sources):
        if source.format in STREAMS:
            close()
            file_range = FileRange(number, 0, source.size_bytes)
            parts.append(InputPart(len(parts), (file_range,), source.size_bytes))
            continue
        for file_range, size in _ranges_of(number, source, part_bytes):
            if pending_bytes + size > part_bytes:
                close()
            last = pending[-1] if pending else None
            if last and last.source == number and last.end == file_range.start:
                pending[-1] = replace(last, end=file_range.end)
            else:
                pending.append(file_range)
            pending_bytes += size
    close()
    num_parts = Counter(file_range.source for part in parts for file_range in part.ranges)
    return [
        replace(
            part,
            whole_sources=frozenset(p.source for p in part.ranges if num_parts[p.source] == 1),
        )
        for part in parts
    ]


def _ranges_of(number: int, source: SourceFile, part_bytes: int) -> Iterator[tuple[FileRange, int]]:
    """Yield the ranges of one file and their sizes in bytes."""
    if source.format == "jsonl":
        for start in range(0, max(1, source.size_bytes), part_bytes):  # an empty file also has one
            end = min(start + part_bytes, source.size_bytes)
            yield FileRange(number, start, end), end - start
    elif source.format == "parquet":
        groups = num_units(source)
        if groups == 0:
            yield FileRange(number, 0, 0), source.size_bytes
        for group in range(groups):
            yield FileRange(number, group, group + 1), source.size_bytes // groups
    else:
        yield FileRange(number, 0, num_units(source)), source.size_bytes


def num_units(source: SourceFile) -> int:
    """Return the number of units that ranges of a file count: row groups of ``parquet``, or bytes.

    Raises:
        DataError: a Parquet file cannot be read.
    """
    return num_row_groups(source.path) if source.format == "parquet" else source.size_bytes


def read_file_range(
    source: SourceFile, file_range: FileRange, position: int, rules: RecordRules
) -> Iterator[TextBatch]:
    """Yield batches of a range.

    Args:
        source: the file.
        file_range: range of the file.
        position: where to resume in a stream, a ``TextBatch.position``; 0: at the beginning.
        rules: rules for a valid record.

    Raises:
        DataError: the file cannot be read, or a column is missing.
    """
    if source.format == "jsonl":
        return read_line_range(source.path, file_range.start, file_range.end, rules)
    if source.format == "parquet":
        return read_parquet(source.path, file_range.start, file_range.end, rules)
    if source.format == "arrow":
        return read_arrow(source.path, position, rules)
    if source.format == "txt":
        return read_text(source.path, rules)
    return read_compressed(source.path, source.format, position, rules)


def rows_before(source: SourceFile, file_range: FileRange) -> int:
    """Count the lines or rows of the file before a range."""
    if source.format == "jsonl":
        return count_lines_before(source.path, file_range.start)
    if source.format == "parquet":
        return num_rows_before(source.path, file_range.start)
    return 0
