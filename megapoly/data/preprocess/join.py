"""Many pieces of token files to one ``.bin``/``.idx`` pair, in constant memory."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megapoly.data.files import full_disk_explained
from megapoly.data.index_file import Chunks, write_index
from megapoly.data.token_files import pair_paths
from megapoly.errors import DataError

_BLOCK_BYTES = 8 << 20


@dataclass(frozen=True)
class PairContent:
    """What goes into a pair.

    Args:
        dtype: type of an id.
        bins: files of ids, in order.
        num_sequences: sequences in all.
        num_documents: documents in all.
        lengths: as of :func:`megapoly.data.index_file.write_index`.
        sequences_per_document: as there.
    """

    dtype: np.dtype
    bins: Sequence[Path]
    num_sequences: int
    num_documents: int
    lengths: Chunks
    sequences_per_document: Chunks

    @property
    def bin_bytes(self) -> int:
        """Size of the ``.bin`` file."""
        return sum(path.stat().st_size for path in self.bins)

    @property
    def idx_bytes(self) -> int:
        """Size of the ``.idx`` file."""
        return 34 + 12 * self.num_sequences + 8 * (self.num_documents + 1)


@dataclass(frozen=True)
class PairHashes:
    """SHA-256 of a pair's files."""

    bin_sha256: str
    idx_sha256: str


def write_pair(
    prefix: Path,
    content: PairContent,
    folder: Path,
    *,
    on_block: Callable[[int, bytes], None] = lambda piece, block: None,
    before_naming: Callable[[], None] = lambda: None,
) -> PairHashes:
    """Write ``PREFIX.bin`` and ``PREFIX.idx``; they get their names when both are complete.

    Args:
        prefix: of the pair.
        content: what goes into it.
        folder: for the files while they are written, on the same disk.
        on_block: called with the number of a piece and each block of it, whole ids.
        before_naming: called when all is written and nothing has its name; may raise.

    Raises:
        DataError: there is no room for them, or the pieces have another size than their index says.
    """
    check_room(prefix, content.bin_bytes + content.idx_bytes)
    finals = pair_paths(prefix)
    temporary = [folder / f"{path.name}.partial" for path in finals]
    with full_disk_explained(*finals), _deleted_at_the_end(temporary):
        with temporary[0].open("wb") as stream:
            writer = HashingWriter(stream)
            for piece, path in enumerate(content.bins):
                with path.open("rb") as source:
                    while block := source.read(_BLOCK_BYTES):
                        writer.write(block)
                        on_block(piece, block)
            bin_sha256 = writer.finish()
        with temporary[1].open("wb") as stream:
            writer = HashingWriter(stream)
            write_index(
                writer,  # type: ignore[arg-type] # all of a stream that it needs
                content.dtype,
                num_sequences=content.num_sequences,
                num_documents=content.num_documents,
                lengths=content.lengths,
                sequences_per_document=content.sequences_per_document,
            )
            idx_sha256 = writer.finish()
        sizes = [path.stat().st_size for path in temporary]
        if sizes != [content.bin_bytes, content.idx_bytes]:
            raise DataError(
                f"`{prefix}` would have {sizes} bytes (.bin, .idx), and {content.bin_bytes} and "
                f"{content.idx_bytes} were counted: a piece changed meanwhile. Start again with "
                "--restart."
            )
        before_naming()
        for partial, final in zip(temporary, finals, strict=True):
            os.replace(partial, final)
    return PairHashes(bin_sha256, idx_sha256)


@contextmanager
def _deleted_at_the_end(paths: Sequence[Path]) -> Iterator[None]:
    """A full disk gets its room back."""
    try:
        yield
    finally:
        for path in paths:
            path.unlink(missing_ok=True)


def check_room(prefix: Path, needed_bytes: int) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        DataError: with what is needed and what is free.
    """
    free = shutil.disk_usage(prefix.absolute().parent).free
    if needed_bytes > free:
        raise DataError(
            f"`{prefix}.bin` and `.idx` need {needed_bytes:,} bytes, and {free:,} are free in "
            f"{prefix.absolute().parent}. Make room and start the same command again; finished "
            "shards stay."
        )


class HashingWriter:
    """Writes a stream and hashes what it writes.

    Args:
        stream: opened for writing.
    """

    def __init__(self, stream: BinaryIO):
        self._stream = stream
        self._digest = hashlib.sha256()

    def write(self, data: bytes) -> None:
        """Append data."""
        self._digest.update(data)
        self._stream.write(data)

    def finish(self) -> str:
        """Bring everything to the disk; SHA-256 of it."""
        self._stream.flush()
        os.fsync(self._stream.fileno())
        return self._digest.hexdigest()


def content_of_documents(
    dtype: np.dtype,
    bins: Sequence[Path],
    num_sequences: int,
    num_documents: int,
    document_lengths: Callable[[], Iterable[np.ndarray]],
) -> PairContent:
    """Content in which a document is one sequence, or none if it has no token.

    Args:
        dtype: type of an id.
        bins: files of ids, in order.
        num_sequences: documents that have a token.
        num_documents: all documents.
        document_lengths: tokens of each document, in chunks.
    """
    return PairContent(
        dtype,
        bins,
        num_sequences,
        num_documents,
        lengths=lambda: (chunk[chunk > 0] for chunk in document_lengths()),
        sequences_per_document=lambda: (chunk > 0 for chunk in document_lengths()),
    )
