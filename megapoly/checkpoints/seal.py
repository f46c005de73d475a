"""Seal checkpoints: ``run.json``, written last, has the size and CRC-32 of every file."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from megapoly.checkpoints.crc32 import crc32, joined
from megapoly.checkpoints.run_file import FILES, run_text
from megapoly.checkpoints.run_file import NAME as RUN
from megapoly.checkpoints.tensor_metadata import NAME as METADATA
from megapoly.checkpoints.tensor_metadata import read_metadata
from megapoly.errors import CheckpointError

_PIECE_BYTES = 1 << 20
# `torch.save` has computed the CRC-32 of each member already; shorter ones are read again.
_LONG_MEMBER_BYTES = 4096
_LOCAL_HEADER_BYTES = 30


def seal(
    folder: Path, run: dict[str, Any], read_back: Mapping[str, tuple[int, int]] | None = None
) -> None:
    """Write ``run.json`` with sizes and CRC-32 of all other files, and flush all to the disk.

    Each entry of a ``.distcp`` file is a zip archive, in which ``torch.save`` put the CRC-32 of
    what was in memory: those numbers are used and only the bytes between are read, 1 KB a tensor.
    ``run.json`` has a CRC-32 of its own content, too.

    Args:
        folder: folder of a checkpoint that has everything but ``run.json``.
        run: the rest of ``run.json``.
        read_back: results of :func:`read_back_crc` by the names of files, which are not read again.
            They must be there, also where another host wrote them and the folder's listing is late.

    Raises:
        CheckpointError: an entry of a ``.distcp`` file is not what ``.metadata`` says.
        OSError: a file cannot be read, written or flushed.
    """
    known = {} if read_back is None else read_back
    listed = {path for path in folder.rglob("*") if path.is_file() and path != folder / RUN}
    names = sorted(listed | {folder / name for name in known})
    entries = {} if known else _entries(folder)
    files = {}
    for path in names:
        name, size = path.relative_to(folder).as_posix(), path.stat().st_size
        if known.get(name, (-1,))[0] == size:
            crc = known[name][1]
        else:
            with path.open("rb") as stream:
                crc = _crc_with_entries(stream, size, sorted(entries.get(name, ())), name)
                os.fsync(stream.fileno())
        files[name] = {"bytes": size, "crc32": f"{crc:08x}"}
    with (folder / RUN).open("w", encoding="utf-8") as stream:
        stream.write(run_text(run | {FILES: files}))
        stream.flush()
        os.fsync(stream.fileno())
    for inner in {path.parent for path in names} | {folder}:
        flush_folder(inner)


def read_back_crc(path: Path, entries: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return size and CRC-32 of a ``.distcp`` file that has been written, after reading it.

    What the disk gives must have the CRC-32 of what was in memory.

    Args:
        path: of the file, which has been flushed.
        entries: offset and length of its entries.

    Raises:
        CheckpointError: the file is not what was written.
        OSError: it cannot be read.
    """
    with path.open("rb") as stream:
        if hasattr(os, "posix_fadvise"):  # read the disk and not the system's copy in memory
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        size = os.fstat(stream.fileno()).st_size
        written = _crc_with_entries(stream, size, sorted(entries), path.name)
        if _crc_of_bytes(stream, 0, size, 0) != written:
            raise CheckpointError(
                f"what is read back from {path.name} is not what was written; see whether the "
                "disk or the memory of this host fails"
            )
    return size, written


def _entries(folder: Path) -> dict[str, list[tuple[int, int]]]:
    """Return (offset, length) of all entries, by the name of their file."""
    entries: dict[str, list[tuple[int, int]]] = {}
    if (folder / METADATA).exists():
        for info in read_metadata(folder).storage_data.values():
            entries.setdefault(info.relative_path, []).append((info.offset, info.length))
    return entries


def _crc_with_entries(
    stream: IO[bytes], size: int, entries: list[tuple[int, int]], name: str
) -> int:
    """Return the CRC-32 of a file; the long members of its entries are not read."""
    crc = position = 0
    for offset, length in entries:
        try:
            members = list(_long_members(_Part(stream, offset, length)))
        except OSError:
            raise
        except Exception as error:  # a damaged archive can raise anything
            raise CheckpointError(
                f"{name}: the entry at byte {offset} is not one of `torch.save` ({error})"
            ) from error
        for start, num_bytes, member_crc in members:
            crc = _crc_of_bytes(stream, position, offset + start, crc)
            crc = joined(crc, member_crc, num_bytes)
            position = offset + start + num_bytes
    return _crc_of_bytes(stream, position, size, crc)


def _long_members(entry: _Part) -> Iterator[tuple[int, int, int]]:
    """Yield start, length and CRC-32 of the long members of an entry, in order."""
    with zipfile.ZipFile(entry) as archive:
        members = [m for m in archive.infolist() if m.file_size >= _LONG_MEMBER_BYTES]
    for member in sorted(members, key=lambda member: member.header_offset):
        if member.compress_type != zipfile.ZIP_STORED:
            raise zipfile.BadZipFile("it is compressed")
        entry.seek(member.header_offset)
        header = entry.read(_LOCAL_HEADER_BYTES)
        # The local header has its own padding, which aligns the data.
        name, padding = (int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
        start = member.header_offset + _LOCAL_HEADER_BYTES + name + padding
        yield start, member.file_size, member.CRC


def _crc_of_bytes(stream: IO[bytes], start: int, end: int, crc: int) -> int:
    """Return the CRC-32 that goes on from ``crc`` over some bytes of a file."""
    stream.seek(start)
    while start < end:
        piece = stream.read(min(_PIECE_BYTES, end - start))
        if not piece:
            raise CheckpointError("a file became shorter while it was read")
        crc, start = crc32(piece, crc), start + len(piece)
    return crc


class _Part(io.RawIOBase):
    """Some bytes of a file, as a file."""

    def __init__(self, stream: IO[bytes], offset: int, length: int):
        self.stream, self.offset, self.length, self.position = stream, offset, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.length}[whence]
        if base + offset < 0:
            raise ValueError("negative position")
        self.position = base + offset
        return self.position

    def readinto(self, buffer: Any) -> int:
        self.stream.seek(self.offset + self.position)
        wanted = max(0, min(len(buffer), self.length - self.position))
        count = self.stream.readinto(memoryview(buffer)[:wanted])  # type: ignore[attr-defined]
        self.position += count
        return count


def flush_folder(folder: Path) -> None:
    """Flush the names in a folder, without which a power failure may lose them."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
