"""Write a ``.bin``/``.idx`` pair from several files of token ids, in constant memory."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megapoly.data.index_file import Chunks, write_index
from megapoly.data.token_files import pair_paths
from megapoly.errors import DataError
from megapoly.platform.files import renamed_when_complete

_BLOCK_BYTES = 8 << 20


@dataclass(frozen=True)
class PairContent:
    """Content of a pair.

    Args:
        dtype: type of a token id.
        bins: files of token ids, in order.
        num_sequences: sequences in total.
        num_documents: documents in total.
        lengths: as in :func:`megapoly.data.index_file.write_index`.
        sequences_per_document: as in :func:`megapoly.data.index_file.write_index`.
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
    """SHA-256 of the files of a pair."""

    bin_sha256: str
    idx_sha256: str


def write_pair(
    prefix: Path,
    content: PairContent,
    folder: Path,
    *,
    on_block: Callable[[int, bytes], None] = lambda number, block: None,
    before_naming: Callable[[], None] = lambda: None,
) -> PairHashes:
    """Write ``PREFIX.bin`` and ``PREFIX.idx``, which get these names when both are complete.

    Args:
        prefix: prefix of the pair.
        content: content of the pair.
        folder: folder on the same disk for the files while they are written.
        on_block: called with the number of a file of ``bins`` and each block of it, of whole ids.
        before_naming: called when both files are complete, before they get their names; may raise.

    Raises:
        DataError: the disk has not enough space, or the sizes differ from ``content``.
    """
    check_free_space(prefix, content.bin_bytes + content.idx_bytes)
    with renamed_when_complete(*pair_paths(prefix), folder=folder) as temporary:
        with temporary[0].open("wb") as stream:
            writer = HashingWriter(stream)
            for number, path in enumerate(content.bins):
                with path.open("rb") as source:
                    while block := source.read(_BLOCK_BYTES):
                        writer.write(block)
                        on_block(number, block)
        bin_sha256 = writer.hexdigest()
        with temporary[1].open("wb") as stream:
            writer = HashingWriter(stream)
            write_index(
                writer,  # type: ignore[arg-type] # has `write`, all that is needed
                content.dtype,
                num_sequences=content.num_sequences,
                num_documents=content.num_documents,
                lengths=content.lengths,
                sequences_per_document=content.sequences_per_document,
            )
        idx_sha256 = writer.hexdigest()
        sizes = [path.stat().st_size for path in temporary]
        if sizes != [content.bin_bytes, content.idx_bytes]:
            raise DataError(
                f"`{prefix}` must have {content.bin_bytes} and {content.idx_bytes} bytes (.bin, "
                f".idx); it would have {sizes}: a file changed during the run. Start again with "
                "--restart."
            )
        before_naming()
    return PairHashes(bin_sha256, idx_sha256)


def check_free_space(prefix: Path, needed_bytes: int) -> None:
    """Check that the disk has enough space for a pair.

    Raises:
        DataError: it has not; the message says how much is needed and free.
    """
    free = shutil.disk_usage(prefix.absolute().parent).free
    if needed_bytes > free:
        raise DataError(
            f"`{prefix}.bin` and `.idx` need {needed_bytes:,} bytes, and {free:,} are free in "
            f"{prefix.absolute().parent}. Free some space and run the same command again; finished "
            "shards are kept."
        )


class HashingWriter:
    """Writes to a stream and hashes what it writes.

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

    def hexdigest(self) -> str:
        """Return the SHA-256 of what was written."""
        return self._digest.hexdigest()


def content_of_documents(
    dtype: np.dtype,
    bins: Sequence[Path],
    num_sequences: int,
    num_documents: int,
    document_lengths: Callable[[], Iterable[np.ndarray]],
) -> PairContent:
    """Return content in which a document is one sequence, or none if it has no tokens.

    Args:
        dtype: type of a token id.
        bins: files of token ids, in order.
        num_sequences: number of documents that have tokens.
        num_documents: number of documents.
        document_lengths: returns the tokens of each document, in chunks.
    """
    return PairContent(
        dtype,
        bins,
        num_sequences,
        num_documents,
        lengths=lambda: (chunk[chunk > 0] for chunk in document_lengths()),
        sequences_per_document=lambda: (chunk > 0 for chunk in document_lengths()),
    )
