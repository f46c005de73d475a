"""A ``.bin``/``.idx`` pair with its manifest, as the sub-commands read it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megapoly.data.manifest import (
    Manifest,
    PairRecord,
    find_manifest,
    manifest_path,
    read_manifest,
)
from megapoly.data.token_files import pair_paths
from megapoly.data.tokenizer import Tokenizer, load_tokenizer
from megapoly.errors import DataError


@dataclass(frozen=True)
class PairWithManifest:
    """A pair and its manifest, if it exists.

    Args:
        prefix: path without ``.bin`` and ``.idx``.
        manifest: manifest that describes the pair.
        record: record of the pair in the manifest.
    """

    prefix: Path
    manifest: Manifest | None
    record: PairRecord | None

    @classmethod
    def at(cls, prefix: Path) -> PairWithManifest:
        """Find and read the manifest of a pair.

        Raises:
            DataError: the manifest cannot be read.
        """
        path = find_manifest(prefix)
        manifest = read_manifest(path) if path else None
        return cls(prefix, manifest, manifest.pair(prefix.name) if manifest else None)


def find_pairs(prefix: Path) -> list[PairWithManifest]:
    """Return the pair of a prefix, or all pairs of the manifest of that prefix.

    Raises:
        DataError: neither exists, or the manifest cannot be read.
    """
    if any(path.is_file() for path in pair_paths(prefix)):
        return [PairWithManifest.at(prefix)]
    if manifest_path(prefix).is_file():
        manifest = read_manifest(manifest_path(prefix))
        return [PairWithManifest(prefix.with_name(r.name), manifest, r) for r in manifest.pairs]
    raise DataError(
        f"`{prefix}` must be the prefix of a .bin/.idx pair or of a .manifest.json, without the "
        f"ending; neither `{prefix}.bin` nor `{manifest_path(prefix)}` exists."
    )


def find_tokenizer(path: str | None, manifest: Manifest | None) -> Tokenizer | None:
    """Return the tokenizer of a path, or the manifest's if its file has not changed.

    Args:
        path: a ``tokenizer.json`` or its folder, named by the user; None: the manifest's.
        manifest: manifest of the pair.

    Raises:
        DataError: ``path`` cannot be read.
    """
    if path is not None:
        return load_tokenizer(path)
    record = manifest.tokenizer if manifest else None
    if record is None or not Path(record.path).is_file():
        return None
    try:
        tokenizer = load_tokenizer(record.path)
    except DataError:  # another file since
        return None
    return tokenizer if tokenizer.fingerprint == record.sha256 else None
