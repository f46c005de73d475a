"""Megatron ``.bin``/``.idx`` pairs: writing, checking and counting.

``PREFIX.bin`` holds the token ids of all documents, ``PREFIX.idx`` their type and lengths.
"""

from __future__ import annotations

import hashlib
import os
import struct
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from megapoly.data.tokenizer import Tokenizer
from megapoly.errors import DataError

# Layout of an index: magic, version, type code, number of sequences, number of document bounds;
# then lengths (int32), byte offsets (int64), document bounds (int64).
# Source: megatron/core/datasets/indexed_dataset.py, _IndexWriter.
_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\x00\x00"
_ENCODE_AT_ONCE = 64
_SAMPLED_BYTES = 1 << 20
_COUNT_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class TokenFile:
    """A ``.bin``/``.idx`` pair whose sizes agree.

    Args:
        prefix: path without ``.bin`` and ``.idx``.
        dtype: type of one token.
        num_sequences: sequences in the index, for our own files one for each document.
        num_tokens: tokens in all of them.
        fingerprint: SHA-256 of the index, the size of ``.bin`` and its first and last mebibyte (a
            terabyte cannot be read at every start).
    """

    prefix: str
    dtype: np.dtype
    num_sequences: int
    num_tokens: int
    fingerprint: str


def open_token_file(prefix: str | Path) -> TokenFile:
    """Check a ``.bin``/``.idx`` pair; the engine opens a truncated one without a word.

    Raises:
        DataError: a file is missing or damaged, or their sizes do not agree.
    """
    bin_path, idx_path = _paths(prefix)
    for path in (bin_path, idx_path):
        if not path.is_file():
            raise DataError(
                f"`{prefix}` must be the prefix of a .bin and an .idx file, without the ending; "
                f"`{path}` does not exist."
            )
    dtype, lengths = _read_index(idx_path)
    num_tokens = int(lengths.sum(dtype=np.int64))
    expected, actual = num_tokens * dtype.itemsize, bin_path.stat().st_size
    if expected != actual:
        raise DataError(
            f"`{bin_path}` has {actual} bytes, but `{idx_path}` describes {expected} ({num_tokens} "
            f"tokens of {dtype.itemsize} bytes). One of them is truncated or belongs to another "
            f"pair: copy or make both again."
        )
    return TokenFile(str(prefix), dtype, len(lengths), num_tokens, _fingerprint(bin_path, idx_path))


def write_token_file(prefix: str | Path, texts: Iterable[str], tokenizer: Tokenizer) -> None:
    """Tokenize documents into a ``.bin``/``.idx`` pair, each ended by ``tokenizer.eod``.

    Nothing stands under the final names before everything is written; the ``.idx`` comes last.
    """
    remaining = iter(texts)
    with _renamed_when_complete(*_paths(prefix)) as (bin_path, idx_path):
        builder = IndexedDatasetBuilder(
            str(bin_path), dtype=DType.optimal_dtype(tokenizer.vocab_size)
        )
        try:
            while batch := list(islice(remaining, _ENCODE_AT_ONCE)):
                for ids in tokenizer.encode_batch(batch):
                    builder.add_document(np.array([*ids, tokenizer.eod]), [len(ids) + 1])
            builder.finalize(str(idx_path))
        finally:
            builder.data_file.close()


def save_arrays(arrays: dict[Path, np.ndarray]) -> None:
    """Write ``.npy`` files, all under temporary names before the first gets its own."""
    with _renamed_when_complete(*arrays) as temporary:
        for path, array in zip(temporary, arrays.values(), strict=True):
            with path.open("wb") as stream:
                np.save(stream, array)


def unigram_entropy(prefix: str | Path) -> float:
    """Entropy of the token frequencies, in nats: the loss of the best model without context.

        H = -sum_v p_v ln p_v,   p_v = count of v / tokens

    Raises:
        DataError: as :func:`open_token_file`, or the file has no token.
    """
    token_file = open_token_file(prefix)
    if token_file.num_tokens == 0:
        raise DataError(f"`{prefix}` must have at least one token; it has none.")
    tokens = np.memmap(f"{prefix}.bin", dtype=token_file.dtype, mode="r")
    counts = np.zeros(0, dtype=np.int64)
    for start in range(0, len(tokens), _COUNT_AT_ONCE):
        part = np.bincount(tokens[start : start + _COUNT_AT_ONCE], minlength=len(counts))
        part[: len(counts)] += counts
        counts = part
    probabilities = counts[counts > 0] / token_file.num_tokens
    return float(-(probabilities * np.log(probabilities)).sum())


def _paths(prefix: str | Path) -> tuple[Path, Path]:
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx")


def _read_index(path: Path) -> tuple[np.dtype, np.ndarray]:
    """Type of a token and length of every sequence."""
    content = np.memmap(path, mode="r") if path.stat().st_size else np.zeros(0, np.uint8)
    if len(content) < _HEADER.size or bytes(content[:9]) != _MAGIC:
        raise DataError(
            f"`{path}` is not a Megatron index: it must begin with a header of "
            f"{_HEADER.size} bytes, the first of them {_MAGIC!r}."
        )
    _, version, code, num_sequences, num_bounds = _HEADER.unpack(content[: _HEADER.size].tobytes())
    if version != 1 or code not in {member.value for member in DType}:
        raise DataError(f"`{path}` must have version 1 and a known type; it has {version}, {code}.")
    expected = _HEADER.size + 12 * num_sequences + 8 * num_bounds
    if len(content) not in (expected, expected + num_sequences):  # with a mode for each sequence
        raise DataError(
            f"`{path}` has {len(content)} bytes, but its header describes {expected}. It is "
            f"truncated: copy or make it and its .bin again."
        )
    lengths = np.frombuffer(content, np.int32, count=num_sequences, offset=_HEADER.size)
    return np.dtype(DType.dtype_from_code(code)), lengths


def _fingerprint(bin_path: Path, idx_path: Path) -> str:
    size = bin_path.stat().st_size
    digest = hashlib.sha256(idx_path.read_bytes())
    digest.update(str(size).encode())
    with bin_path.open("rb") as stream:
        digest.update(stream.read(_SAMPLED_BYTES))
        stream.seek(max(0, size - _SAMPLED_BYTES))
        digest.update(stream.read())
    return digest.hexdigest()


@contextmanager
def _renamed_when_complete(*paths: Path) -> Iterator[list[Path]]:
    """Yield temporary names beside ``paths``; rename them, in order, if the body succeeds."""
    suffix = f".{uuid.uuid4().hex[:8]}.tmp"
    temporary = [path.with_name(f".{path.name}{suffix}") for path in paths]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        for source, target in zip(temporary, paths, strict=True):
            os.replace(source, target)
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)
