"""Read and write the ``.idx`` half of a Megatron ``.bin``/``.idx`` pair, without the engine.

Layout, little-endian: magic (9 bytes), version (uint64), type code (uint8), number of sequences
(uint64), number of document bounds (uint64); then the length of every sequence (int32, tokens), its
offset in ``.bin`` (int64, bytes), and the document bounds (int64): document k consists of the
sequences from bound k up to bound k + 1. A multimodal file ends with a mode (int8) for each
sequence.

Source: megatron/core/datasets/indexed_dataset.py (0.16.1), ``_IndexWriter``, which keeps every
length as a Python object and imports torch; this module streams.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megapoly.errors import DataError

_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\x00\x00"
# Source: ``DType`` in the same file.
_TYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_CODES = {np.dtype(dtype): code for code, dtype in _TYPES.items()}

_DOCUMENTS_AT_ONCE = 1 << 18

Chunks = Callable[[], Iterable[np.ndarray]]


def token_dtype(num_tokens: int) -> np.dtype:
    """Return the type of a token id for a vocabulary size: uint16 below 65,500 tokens, else int32.

    Source: ``DType.optimal_dtype``.
    """
    return np.dtype(np.uint16 if num_tokens < 65500 else np.int32)


@dataclass(frozen=True)
class Index:
    """Content of an ``.idx`` file; the arrays are views of the mapped file.

    Args:
        dtype: type of a token id.
        lengths: [sequences] int32, tokens.
        offsets: [sequences] int64, bytes.
        document_bounds: [documents + 1] int64, sequences.
        has_modes: whether the file is multimodal.
    """

    dtype: np.dtype
    lengths: np.ndarray
    offsets: np.ndarray
    document_bounds: np.ndarray
    has_modes: bool

    @property
    def num_sequences(self) -> int:
        """Number of sequences; for text usually one for each document that is not empty."""
        return len(self.lengths)

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return len(self.document_bounds) - 1

    @property
    def num_tokens(self) -> int:
        """Number of tokens in all sequences."""
        return int(self.lengths.sum(dtype=np.int64))

    def document_lengths(self) -> Iterator[np.ndarray]:
        """Yield the tokens of each document, all of its sequences together, in chunks of int64."""
        for start in range(0, self.num_documents, _DOCUMENTS_AT_ONCE):
            bounds = self.document_bounds[start : start + _DOCUMENTS_AT_ONCE + 1]
            sizes = self.lengths[bounds[0] : bounds[-1]]
            ends = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
            yield np.diff(ends[bounds - bounds[0]])


def read_index(path: Path) -> Index:
    """Map an ``.idx`` file and check its header against its size.

    Raises:
        DataError: it is not an index, its version or type is unknown, or its size is not what its
            header describes.
    """
    content = np.memmap(path, mode="r") if path.stat().st_size else np.zeros(0, np.uint8)
    if len(content) < _HEADER.size or bytes(content[:9]) != _MAGIC:
        raise DataError(
            f"`{path}` is not a Megatron index: it must begin with a header of "
            f"{_HEADER.size} bytes, the first of them {_MAGIC!r}."
        )
    _, version, code, num_sequences, num_bounds = _HEADER.unpack(content[: _HEADER.size].tobytes())
    if version != 1 or code not in _TYPES:
        raise DataError(f"`{path}` must have version 1 and a known type; it has {version}, {code}.")
    expected = _HEADER.size + 12 * num_sequences + 8 * num_bounds
    if len(content) not in (expected, expected + num_sequences):  # with a mode for each sequence
        raise DataError(
            f"`{path}` has {len(content)} bytes, but its header describes {expected}. It is "
            f"truncated: copy or create it and its .bin again."
        )

    def array(dtype: str, count: int, offset: int) -> np.ndarray:
        return np.frombuffer(content, dtype, count=count, offset=offset)

    lengths_end = _HEADER.size + 4 * num_sequences
    return Index(
        dtype=np.dtype(_TYPES[code]),
        lengths=array("<i4", num_sequences, _HEADER.size),
        offsets=array("<i8", num_sequences, lengths_end),
        document_bounds=array("<i8", num_bounds, lengths_end + 8 * num_sequences),
        has_modes=len(content) != expected,
    )


def write_index(
    stream: BinaryIO,
    dtype: np.dtype,
    *,
    num_sequences: int,
    num_documents: int,
    lengths: Chunks,
    sequences_per_document: Chunks,
) -> None:
    """Write an index in constant memory.

    Args:
        stream: anything with ``write``.
        dtype: type of a token id.
        num_sequences: sequences in all chunks.
        num_documents: documents in all chunks.
        lengths: called twice; returns the lengths of the sequences, in chunks.
        sequences_per_document: called once; returns the number of sequences of each document, in
            chunks.
    """
    stream.write(_HEADER.pack(_MAGIC, 1, _CODES[dtype], num_sequences, num_documents + 1))
    for chunk in lengths():
        stream.write(chunk.astype("<i4").tobytes())
    for starts in _starts(lengths()):
        stream.write((starts * dtype.itemsize).astype("<i8").tobytes())
    stream.write(np.zeros(1, "<i8").tobytes())
    for starts, counts in _starts_and_sizes(sequences_per_document()):
        stream.write((starts + counts).astype("<i8").tobytes())


def _starts(chunks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    return (starts for starts, _ in _starts_and_sizes(chunks))


def _starts_and_sizes(chunks: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield, for each chunk of sizes, the sum of all sizes before each one, and the sizes."""
    total = 0
    for chunk in chunks:
        sizes = chunk.astype(np.int64)
        ends = total + np.cumsum(sizes)
        if len(sizes):
            total = int(ends[-1])
        yield ends - sizes, sizes
