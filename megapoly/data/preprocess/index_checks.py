"""Check the content of an index: lengths, offsets and document bounds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megapoly.data.index_file import Index

_AT_ONCE = 1 << 20


def index_problems(path: Path, index: Index) -> Iterator[str]:
    """Check lengths (above 0), offsets (their running sum) and document bounds (all sequences)."""
    for problems in (_length_problems, _offset_problems, _bound_problems):
        for problem in problems(index):
            yield f"`{path}`: {problem}. The index is damaged: copy or create the pair again."


def _length_problems(index: Index) -> Iterator[str]:
    for start in range(0, index.num_sequences, _AT_ONCE):
        is_wrong = index.lengths[start : start + _AT_ONCE] <= 0
        if is_wrong.any():
            place = start + int(np.argmax(is_wrong))
            yield f"sequence {place} has {index.lengths[place]} tokens"
            return


def _offset_problems(index: Index) -> Iterator[str]:
    total = 0
    for start in range(0, index.num_sequences, _AT_ONCE):
        sizes = index.lengths[start : start + _AT_ONCE].astype(np.int64) * index.dtype.itemsize
        expected = total + np.cumsum(sizes) - sizes
        is_wrong = index.offsets[start : start + _AT_ONCE] != expected
        if is_wrong.any():
            place = start + int(np.argmax(is_wrong))
            yield (
                f"sequence {place} must begin at byte {expected[place - start]}, after the "
                f"previous ones; it begins at {index.offsets[place]}"
            )
            return
        total += int(sizes.sum())


def _bound_problems(index: Index) -> Iterator[str]:
    bounds = index.document_bounds
    reach = bounds[[0, -1]].tolist() if len(bounds) else []
    if reach != [0, index.num_sequences]:
        yield (
            f"documents must reach from sequence 0 to {index.num_sequences}; they reach from "
            f"{reach}"
        )
    for start in range(0, index.num_documents, _AT_ONCE):
        falls = np.diff(bounds[start : start + _AT_ONCE + 1]) < 0
        if falls.any():
            yield f"document {start + int(np.argmax(falls))} ends before it begins"
            return
