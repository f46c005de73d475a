"""Readers of JSON lines: a byte range of a plain file, and a compressed stream."""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from megapoly.data.preprocess.text_extraction import (
    OversizedLine,
    RecordRules,
    Rejection,
    TextBatch,
    parse_lines,
)
from megapoly.platform import extras

READ_BYTES = 4 << 20
# This much of a compressed file may be counted as read before its text is.
_GZIP_READ_BYTES = 64 << 10
# A zstd frame can be 20,000 times smaller than its content, and the library does not limit what one
# call returns.
_ZSTD_READ_BYTES = 16 << 10
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class DamagedStream(Exception):
    """A compressed file is truncated or corrupt.

    Args:
        reason: reason for counting.
        detail: where it is damaged.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(reason)
        self.reason, self.detail = reason, detail


class LineSplitter:
    """Splits a stream of bytes into lines without keeping lines above a limit in memory.

    Args:
        max_bytes: longest line that is kept.
    """

    def __init__(self, max_bytes: int):
        self._max_bytes = max_bytes
        self._pending = bytearray()
        self._dropped = 0  # bytes of a line that is above the limit

    @property
    def num_pending(self) -> int:
        """Number of bytes since the last end of a line."""
        return len(self._pending) + self._dropped

    def feed(self, data: bytes) -> list[bytes | OversizedLine]:
        """Return the lines that end in ``data``, without their line ends."""
        *ended, rest = data.split(b"\n")
        lines = [self._finish(line) for line in ended[:1]]
        if self._max_bytes < len(data):
            lines += [self._finish(line) for line in ended[1:]]
        else:
            lines += ended[1:]
        self._keep(rest)
        return lines

    def end(self) -> list[bytes | OversizedLine]:
        """Return the last line, if the stream does not end with a line end."""
        return [self._finish(b"")] if self.num_pending else []

    def _finish(self, ending: bytes) -> bytes | OversizedLine:
        size = self._dropped + len(self._pending) + len(ending)
        line = bytes(self._pending) + ending if size <= self._max_bytes else OversizedLine(size)
        self._pending.clear()
        self._dropped = 0
        return line

    def _keep(self, data: bytes) -> None:
        if self._dropped or len(self._pending) + len(data) > self._max_bytes:
            self._dropped += len(self._pending) + len(data)
            self._pending.clear()
        else:
            self._pending += data


def read_line_range(path: Path, start: int, end: int, rules: RecordRules) -> Iterator[TextBatch]:
    """Yield batches of the lines that begin at a byte from ``start`` up to ``end``.

    Consecutive ranges give every line of the file once. The last line may continue after ``end``.
    """
    splitter = LineSplitter(rules.max_document_bytes)
    row = 0
    with path.open("rb", buffering=0) as stream:
        for data in _range_chunks(stream, start, end, splitter):
            lines = splitter.feed(data) if data else splitter.end()
            columns, rejected = parse_lines(lines, row, rules)
            yield TextBatch(columns, rejected, len(lines), len(data))
            row += len(lines)


def _range_chunks(
    stream: io.FileIO, start: int, end: int, splitter: LineSplitter
) -> Iterator[bytes]:
    """Yield the bytes of the lines that begin in a range; an empty chunk marks the end."""
    position = _first_line(stream, start, end)
    if position is None:
        return
    stream.seek(position)
    while position < end:
        data = stream.read(min(READ_BYTES, end - position))
        if not data:
            break
        at_beginning, position = position == 0, position + len(data)
        if kept := data.removeprefix(_BYTE_ORDER_MARK) if at_beginning else data:
            yield kept
    while splitter.num_pending and (data := stream.read(READ_BYTES)):
        line_end = data.find(b"\n") + 1
        yield data[:line_end] if line_end else data
        if line_end:
            return
    yield b""


def _first_line(stream: io.FileIO, start: int, end: int) -> int | None:
    """Return where the first line at or after ``start`` begins; None: not before ``end``."""
    if start == 0:
        return 0
    position = start - 1
    stream.seek(position)
    while position < end and (data := stream.read(READ_BYTES)):
        line_end = data.find(b"\n")
        if line_end >= 0:
            return position + line_end + 1
        position += len(data)
    return None


def count_lines_before(path: Path, start: int) -> int:
    """Count the lines of a file that begin before the byte ``start``."""
    count = position = 0
    ending = b"\n"
    with path.open("rb", buffering=0) as stream:
        while position < start and (data := stream.read(min(READ_BYTES, start - position))):
            count += data.count(b"\n")
            position += len(data)
            ending = data[-1:]
    return count + (ending != b"\n")


def read_compressed(
    path: Path, format_: str, position: int, rules: RecordRules
) -> Iterator[TextBatch]:
    """Yield batches of a ``jsonl.gz`` or ``jsonl.zst`` file, starting at a position.

    If the file is truncated or corrupt, the last batch has a rejected row for what is lost.

    Args:
        path: path of the file.
        format_: ``jsonl.gz`` or ``jsonl.zst``.
        position: ``TextBatch.position`` of the last batch read before, or 0: an offset in the
            decompressed text, always the beginning of a line. The text before it is decompressed
            and dropped.
        rules: rules for a valid record.
    """
    splitter = LineSplitter(rules.max_document_bytes)
    row = offset = consumed = 0
    with path.open("rb") as stream:
        chunks = _gzip_chunks(stream) if format_ == "jsonl.gz" else _zstd_chunks(stream)
        for data in _gathered(chunks):
            damage = data if isinstance(data, DamagedStream) else None
            if isinstance(data, bytes) and data:
                is_first, skipped = offset == 0, max(0, position - offset)
                offset += len(data)
                if skipped >= len(data):
                    continue
                data = data[skipped:]
                lines = splitter.feed(data.removeprefix(_BYTE_ORDER_MARK) if is_first else data)
            else:
                # If damaged, the incomplete line belongs to what is lost.
                lines = [] if damage else splitter.end()
            columns, rejected = parse_lines(lines, row, rules)
            batch = TextBatch(columns, rejected, len(lines), stream.tell() - consumed)
            batch.position = offset - splitter.num_pending
            row, consumed = row + len(lines), stream.tell()
            if damage:
                batch.num_rows += 1
                batch.rejected.append(Rejection(row, damage.reason, damage.detail, None, 0))
            yield batch


def _gathered(chunks: Iterator[bytes]) -> Iterator[bytes | DamagedStream]:
    """Join small chunks to a size that is worth a call; end with an empty one, or the damage."""
    end: bytes | DamagedStream = b""
    pending, size = [], 0
    while True:
        try:
            chunk = next(chunks, b"")
        except DamagedStream as damage:
            chunk, end = b"", damage
        pending.append(chunk)
        size += len(chunk)
        if size and (size >= READ_BYTES or not chunk):
            yield b"".join(pending)
            pending, size = [], 0
        if not chunk:
            yield end
            return


def _gzip_chunks(stream: BinaryIO) -> Iterator[bytes]:
    # An interrupted download may leave an empty file: it counts as truncated.
    decompressor, begun = zlib.decompressobj(wbits=31), True
    while data := stream.read(_GZIP_READ_BYTES):
        while data:
            begun = True
            try:
                text = decompressor.decompress(data, READ_BYTES)
            except zlib.error as error:
                raise DamagedStream(
                    "corrupt gzip", f"near byte {stream.tell() - len(data):,}: {error}"
                ) from error
            if text:
                yield text
            data = decompressor.unconsumed_tail
            if decompressor.eof:
                # Another member may follow, or zeros that pad a block.
                data = decompressor.unused_data.lstrip(b"\0")
                decompressor, begun = zlib.decompressobj(wbits=31), False
    if begun:
        raise DamagedStream("truncated gzip", f"it ends after {stream.tell():,} bytes")


def _zstd_chunks(stream: BinaryIO) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError as error:
        raise extras.unavailable("Reading .zst", "data", ["zstandard"]) from error
    # Frames of `zstd --long=31` need a window of 2 GiB.
    context = zstandard.ZstdDecompressor(max_window_size=2**31)
    decompressor, begun = context.decompressobj(), True
    while data := stream.read(_ZSTD_READ_BYTES):
        while data:
            begun = True
            try:
                text = decompressor.decompress(data)
            except zstandard.ZstdError as error:
                raise DamagedStream(
                    "corrupt zstd", f"before byte {stream.tell():,}: {error}"
                ) from error
            if text:
                yield text
            data = b""
            if decompressor.eof:
                data = decompressor.unused_data
                decompressor, begun = context.decompressobj(), False
    if begun:
        raise DamagedStream("truncated zstd", f"it ends after {stream.tell():,} bytes")
