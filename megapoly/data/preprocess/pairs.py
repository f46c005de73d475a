"""What the sub-commands read of a pair, in constant memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megapoly.data.index_file import Index
from megapoly.data.manifest import (
    Manifest,
    PairRecord,
    find_manifest,
    manifest_path,
    read_manifest,
)
from megapoly.data.token_files import pair_paths, sha256_of
from megapoly.data.tokenizer import Tokenizer, load_tokenizer
from megapoly.errors import DataError

DOCUMENTS_AT_ONCE = 1 << 18
BLOCK_BYTES = 16 << 20


@dataclass(frozen=True)
class Described:
    """A pair and its manifest, if it has one.

    Args:
        prefix: without ``.bin`` and ``.idx``.
        manifest: that describes it.
        record: of the pair in the manifest.
    """

    prefix: Path
    manifest: Manifest | None
    record: PairRecord | None


def find_pairs(prefix: Path) -> list[Described]:
    """The pair of a prefix, or all pairs of the manifest of that prefix.

    Raises:
        DataError: there is neither, or the manifest cannot be read.
    """
    if any(path.is_file() for path in pair_paths(prefix)):
        path = find_manifest(prefix)
        manifest = read_manifest(path) if path else None
        return [Described(prefix, manifest, manifest.pair(prefix.name) if manifest else None)]
    if manifest_path(prefix).is_file():
        manifest = read_manifest(manifest_path(prefix))
        return [Described(prefix.with_name(r.name), manifest, r) for r in manifest.pairs]
    raise DataError(
        f"`{prefix}` must be the prefix of a .bin/.idx pair or of a .manifest.json, without the "
        f"ending; there is neither `{prefix}.bin` nor `{manifest_path(prefix)}`."
    )


def document_lengths(index: Index) -> Iterator[np.ndarray]:
    """Tokens of each document, all of its sequences together, in chunks of int64."""
    for start in range(0, index.num_documents, DOCUMENTS_AT_ONCE):
        bounds = index.document_bounds[start : start + DOCUMENTS_AT_ONCE + 1]
        sizes = index.lengths[bounds[0] : bounds[-1]]
        ends = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        yield np.diff(ends[bounds - bounds[0]])


def find_tokenizer(path: str | None, manifest: Manifest | None) -> Tokenizer | None:
    """The tokenizer that is named, or that of the manifest if its file is still the same.

    Args:
        path: a ``tokenizer.json`` or its folder, named by the user.
        manifest: of the pair.

    Raises:
        DataError: the named one cannot be read.
    """
    if path is not None:
        return load_tokenizer(path)
    record = manifest.tokenizer if manifest else None
    if record is None or not Path(record.path).is_file():
        return None
    return Tokenizer(Path(record.path)) if sha256_of(Path(record.path)) == record.sha256 else None
