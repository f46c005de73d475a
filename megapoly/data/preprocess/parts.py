"""The input cut into parts of work that do not depend on the number of workers."""

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
from megapoly.data.preprocess.jsonl import count_lines_before, read_compressed, read_range
from megapoly.data.preprocess.records import Block, RecordRules
from megapoly.data.preprocess.sources import Source

# Formats that are read from the beginning: one worker reads such a file, and a part of work can be
# continued inside it.
STREAMS = ("jsonl.gz", "jsonl.zst", "arrow")


@dataclass(frozen=True)
class Piece:
    """A range of a file: bytes of ``jsonl``, row groups of ``parquet``, else the whole.

    Args:
        source: place of the file in the list of sources.
        start: where it begins.
        end: behind where it ends.
    """

    source: int
    start: int
    end: int


@dataclass(frozen=True)
class Part:
    """What one worker does at a time: pieces that follow one another in the input.

    Args:
        index: place of the part in the whole.
        pieces: one, or several small files.
        is_stream: whether it is one file that can only be read from the beginning.
        size_bytes: on disk, about.
        whole_sources: files that this part has all of.
    """

    index: int
    pieces: tuple[Piece, ...]
    is_stream: bool
    size_bytes: int
    whole_sources: frozenset[int] = frozenset()


def cut(sources: Sequence[Source], part_bytes: int) -> list[Part]:
    """Parts of about ``part_bytes`` bytes, in the order of the input.

    Raises:
        DataError: a Parquet file cannot be read.
    """
    assert part_bytes >= 16, "a part holds more than a byte-order mark"
    parts: list[Part] = []
    pending: list[Piece] = []
    pending_bytes = 0

    def close() -> None:
        nonlocal pending, pending_bytes
        if pending:
            parts.append(Part(len(parts), tuple(pending), False, pending_bytes))
        pending, pending_bytes = [], 0

    for number, source in enumerate(sources):
        if source.format in STREAMS:
            close()
            piece = Piece(number, 0, source.size_bytes)
            parts.append(Part(len(parts), (piece,), True, source.size_bytes))
            continue
        for piece, size in _pieces(number, source, part_bytes):
            if pending_bytes + size > part_bytes:
                close()
            last = pending[-1] if pending else None
            if last and last.source == number and last.end == piece.start:
                pending[-1] = replace(last, end=piece.end)
            else:
                pending.append(piece)
            pending_bytes += size
    close()
    num_parts = Counter(piece.source for part in parts for piece in part.pieces)
    return [
        replace(
            part,
            whole_sources=frozenset(p.source for p in part.pieces if num_parts[p.source] == 1),
        )
        for part in parts
    ]


def _pieces(number: int, source: Source, part_bytes: int) -> Iterator[tuple[Piece, int]]:
    """Pieces of one file and their sizes in bytes."""
    if source.format == "jsonl":
        for start in range(0, max(1, source.size_bytes), part_bytes):  # also an empty file has one
            end = min(start + part_bytes, source.size_bytes)
            yield Piece(number, start, end), end - start
    elif source.format == "parquet":
        groups = num_units(source)
        if groups == 0:
            yield Piece(number, 0, 0), source.size_bytes
        for group in range(groups):
            yield Piece(number, group, group + 1), source.size_bytes // groups
    else:
        yield Piece(number, 0, num_units(source)), source.size_bytes


def num_units(source: Source) -> int:
    """What the pieces of a file count: row groups of ``parquet``, else bytes.

    Raises:
        DataError: a Parquet file cannot be read.
    """
    return num_row_groups(source.path) if source.format == "parquet" else source.size_bytes


def read_piece(source: Source, piece: Piece, position: int, rules: RecordRules) -> Iterator[Block]:
    """Blocks of a piece.

    Args:
        source: the file of the piece.
        piece: which part of it.
        position: where to go on in a stream, a ``Block.position``; 0: at the beginning.
        rules: what makes a record good.

    Raises:
        DataError: the file cannot be read, or lacks a column.
    """
    if source.format == "jsonl":
        return read_range(source.path, piece.start, piece.end, rules)
    if source.format == "parquet":
        return read_parquet(source.path, piece.start, piece.end, rules)
    if source.format == "arrow":
        return read_arrow(source.path, position, rules)
    if source.format == "txt":
        return read_text(source.path, rules)
    return read_compressed(source.path, source.format, position, rules)


def rows_before(source: Source, piece: Piece) -> int:
    """Lines or rows of the file before those of a piece."""
    if source.format == "jsonl":
        return count_lines_before(source.path, piece.start)
    if source.format == "parquet":
        return num_rows_before(source.path, piece.start)
    return 0
