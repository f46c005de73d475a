"""A ``.bin``/``.idx`` pair with its manifest, as the sub-commands read it."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from megapoly.config.command_line import path_or_url
from megapoly.data.manifest import (
    Manifest,
    PairRecord,
    find_manifest,
    manifest_path,
    read_manifest,
)
from megapoly.data.stored_pairs import StoredPairs
from megapoly.data.token_files import pair_paths
from megapoly.data.tokenizer import Tokenizer, load_tokenizer
from megapoly.errors import DataError
from megapoly.platform.stores import cache_folder, sole_process


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


def add_prefixes(parser: argparse.ArgumentParser) -> None:
    """Add the argument of commands that read pairs, each of which :func:`find_pairs` takes."""
    parser.add_argument(
        "prefixes",
        nargs="+",
        type=path_or_url,
        metavar="PREFIX",
        help="prefixes of pairs or manifests",
    )


def local_prefixes(place: Path | str) -> list[Path]:
    """Return a prefix, or the copies of the pairs in a store that a URL names.

    Copies are made in :func:`~megapoly.platform.stores.cache_folder`, and verified.

    Raises:
        DataError: the store has no such pair, or fails.
        UnavailableError: the package for this kind of store is not installed.
    """
    if isinstance(place, Path):
        return [place]
    with sole_process(cache_folder(), DataError):
        pairs = StoredPairs([place], cache_folder())
        return [Path(pairs.fetch(pair)) for pair in pairs.find()[place]]


def find_pairs(place: Path | str) -> list[PairWithManifest]:
    """Return the pair of a prefix, or all pairs of the manifest of that prefix.

    Args:
        place: a prefix, or the URL of one or of a pattern, see :func:`local_prefixes`.

    Raises:
        DataError: neither exists, or the manifest cannot be read.
    """
    return [pair for prefix in local_prefixes(place) for pair in _local_pairs(prefix)]


def _local_pairs(prefix: Path) -> list[PairWithManifest]:
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
