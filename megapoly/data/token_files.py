"""Megatron ``.bin``/``.idx`` pairs: write, open and count them.

``PREFIX.bin`` holds the token ids of all documents, ``PREFIX.idx`` their type and lengths. Needs
neither torch nor the engine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from megapoly.data.index_file import Index, read_index, token_dtype, write_index
from megapoly.data.tokenizer import Tokenizer
from megapoly.errors import DataError
from megapoly.platform.files import renamed_when_complete

_ENCODE_AT_ONCE = 64
_SAMPLED_BYTES = 1 << 20
_COUNT_AT_ONCE = 1 << 24
_SEQUENCES_AT_ONCE = 1 << 20
# No vocabulary is this large: a higher id means damage, and counting it would take gigabytes.
_MOST_IDS = 1 << 26


@dataclass(frozen=True)
class TokenFile:
    """A ``.bin``/``.idx`` pair whose sizes agree.

    Args:
        prefix: path without ``.bin`` and ``.idx``.
        dtype: type of a token id.
        num_sequences: sequences in the index; files written by megapoly have one for each document
            that is not empty.
        num_tokens: tokens in total.
        idx_sha256: SHA-256 of the index.
        fingerprint: SHA-256 of the index, the size of ``.bin`` and its first and last mebibyte (a
            terabyte cannot be read at every start).
    """

    prefix: str
    dtype: np.dtype
    num_sequences: int
    num_tokens: int
    idx_sha256: str
    fingerprint: str


def open_token_file(prefix: str | Path) -> TokenFile:
    """Open a ``.bin``/``.idx`` pair and check its sizes; the engine opens a truncated one silently.

    Raises:
        DataError: a file is missing or damaged, their sizes do not agree, or a sequence is outside
            of ``.bin``.
    """
    bin_path, idx_path = pair_paths(prefix)
    for path in (bin_path, idx_path):
        if not path.is_file():
            raise DataError(
                f"`{prefix}` must be the prefix of a .bin and an .idx file, without the ending; "
                f"`{path}` does not exist."
            )
    index = read_index(idx_path)
    num_tokens = index.num_tokens
    expected, actual = num_tokens * index.dtype.itemsize, bin_path.stat().st_size
    if expected != actual:
        raise DataError(
            f"`{bin_path}` has {actual} bytes, but `{idx_path}` describes {expected} ({num_tokens} "
            f"tokens of {index.dtype.itemsize} bytes). One of them is truncated or belongs to "
            "another pair: copy or create both again."
        )
    _check_places(index, idx_path, actual)
    idx_sha256 = sha256_of(idx_path)
    return TokenFile(
        str(prefix),
        index.dtype,
        index.num_sequences,
        num_tokens,
        idx_sha256,
        _fingerprint(bin_path, idx_sha256),
    )


def _check_places(index: Index, path: Path, bin_bytes: int) -> None:
    """Check that every sequence is inside of ``.bin``; the engine reads where the index says."""
    for start in range(0, index.num_sequences, _SEQUENCES_AT_ONCE):
        part = slice(start, start + _SEQUENCES_AT_ONCE)
        lengths, offsets = index.lengths[part].astype(np.int64), index.offsets[part]
        # A subtraction: the sum of an offset and a length could overflow.
        is_wrong = (lengths < 0) | (offsets < 0) | (offsets > bin_bytes)
        is_wrong |= offsets > bin_bytes - lengths * index.dtype.itemsize
        if is_wrong.any():
            place = int(np.argmax(is_wrong))
            raise DataError(
                f"Sequences must be inside of the .bin file, which has {bin_bytes} bytes; "
                f"sequence {start + place} in `{path}` has {lengths[place]} tokens from byte "
                f"{offsets[place]}. The index is damaged: copy or create the pair again."
            )


def write_token_file(prefix: str | Path, texts: Iterable[str], tokenizer: Tokenizer) -> None:
    """Tokenize documents into a ``.bin``/``.idx`` pair; each document ends with ``tokenizer.eod``.

    For text of moderate size: lengths are kept in memory, and one process does all the work. The
    files get their final names when both are complete, ``.idx`` last.
    """
    remaining = iter(texts)
    dtype = token_dtype(tokenizer.vocab_size)
    lengths: list[int] = []
    with renamed_when_complete(*pair_paths(prefix)) as (bin_path, idx_path):
        with bin_path.open("wb") as stream:
            while batch := list(islice(remaining, _ENCODE_AT_ONCE)):
                for ids in tokenizer.encode_batch(batch):
                    stream.write(np.array([*ids, tokenizer.eod], dtype).tobytes())
                    lengths.append(len(ids) + 1)
        with idx_path.open("wb") as stream:
            write_index(
                stream,
                dtype,
                num_sequences=len(lengths),
                num_documents=len(lengths),
                lengths=lambda: [np.array(lengths, np.int64)],
                sequences_per_document=lambda: [np.ones(len(lengths), np.int64)],
            )


def pair_paths(prefix: str | Path) -> tuple[Path, Path]:
    """Return ``PREFIX.bin`` and ``PREFIX.idx``."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx")


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_SAMPLED_BYTES):
            digest.update(block)
    return digest.hexdigest()


def unigram_entropy(prefix: str | Path) -> float:
    """Return the entropy of the token frequencies in nats.

    It is the loss of the best model without context.

        H = -sum_v p_v ln p_v,   p_v = count of v / tokens

    Raises:
        DataError: as :func:`open_token_file`, or the file has no tokens.
    """
    counts = token_counts(prefix)
    if not counts.any():
        raise DataError(f"`{prefix}` must have at least one token; it has none.")
    return entropy_of(counts)


def token_counts(prefix: str | Path) -> np.ndarray:
    """Count how often each token id occurs; [highest id + 1] int64.

    Raises:
        DataError: as :func:`open_token_file`, or an id is negative or not below 2^26.
    """
    token_file = open_token_file(prefix)
    counts = np.zeros(0, dtype=np.int64)
    if token_file.num_tokens == 0:
        return counts
    tokens = np.memmap(f"{prefix}.bin", dtype=token_file.dtype, mode="r")
    for start in range(0, len(tokens), _COUNT_AT_ONCE):
        lowest, highest = (f(tokens[start : start + _COUNT_AT_ONCE]) for f in (np.min, np.max))
        if lowest < 0:
            raise DataError(negative_id(f"{prefix}.bin", int(lowest), token_file.dtype))
        if highest >= _MOST_IDS:
            raise DataError(
                f"`{prefix}.bin` must hold ids from 0 to {_MOST_IDS - 1}; it has {highest}. It is "
                "damaged: copy or create it again."
            )
        total = np.bincount(tokens[start : start + _COUNT_AT_ONCE], minlength=len(counts))
        total[: len(counts)] += counts
        counts = total
    return counts


def negative_id(path: str | Path, token_id: int, dtype: np.dtype) -> str:
    """Return the message about a negative token id in a ``.bin``."""
    wrapped = ""
    if dtype.itemsize < 4:
        wrapped = f", or its ids were too large for {dtype.name}: write them as uint16 or int32"
    return (
        f"Token ids must not be negative; `{path}` holds {token_id} ({dtype.name}). It is damaged: "
        f"copy or create it again{wrapped}."
    )


def entropy_of(counts: np.ndarray) -> float:
    """Return the entropy of frequencies in nats; 0 if all counts are 0."""
    if not counts.any():
        return 0.0
    probabilities = counts[counts > 0] / counts.sum()
    return float(-(probabilities * np.log(probabilities)).sum())


def _fingerprint(bin_path: Path, idx_sha256: str) -> str:
    size = bin_path.stat().st_size
    digest = hashlib.sha256(idx_sha256.encode())
    digest.update(str(size).encode())
    with bin_path.open("rb") as stream:
        digest.update(stream.read(_SAMPLED_BYTES))
        stream.seek(max(0, size - _SAMPLED_BYTES))
        digest.update(stream.read())
    return digest.hexdigest()
