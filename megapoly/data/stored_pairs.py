"""Token files in object stores: copied once to ``data.cache_dir``, verified, and read from there.

``s3://bucket/tokens/books`` is copied to ``CACHE_DIR/stores/s3/bucket/tokens/books``, with its
manifest. The engine streams from S3 instead (megatron/core/datasets/indexed_dataset.py, 0.16.1): it
reads 256 MiB from the store for each sample that is not where the last one was, and samples are
read in random order.
"""

from __future__ import annotations

import glob
import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megapoly.data.cache_files import read_cached_object
from megapoly.data.manifest import find_manifest, manifest_names, read_manifest
from megapoly.data.token_files import pair_paths, sha256_of
from megapoly.errors import DataError
from megapoly.platform.files import full_disk_explained, renamed_when_complete, write_text
from megapoly.platform.stores import file_version, open_store, path_below, store_errors

_ENDINGS = (".bin", ".idx")
_FOLDER = "stores"


class StoredPairs:
    """The pairs that URLs name, and their copies.

    Args:
        urls: prefixes of pairs, or patterns of prefixes.
        cache_dir: folder for the copies.
    """

    def __init__(self, urls: Sequence[str], cache_dir: Path):
        self._urls, self._cache_dir = list(urls), cache_dir
        key = hashlib.sha256(json.dumps(self._urls).encode()).hexdigest()[:16]
        self._listing = cache_dir / _FOLDER / f"listing_{key}.json"

    def find(self) -> dict[str, list[str]]:
        """Ask the stores for the pairs, and write the answer for :meth:`found`.

        Returns:
            The URLs of the pairs of each URL, in sorted order.

        Raises:
            DataError: a store cannot be read, a pair does not exist, no pair matches a pattern, or
                ``cache_dir`` has no room for all of them.
            UnavailableError: the package for a store is not installed.
        """
        pairs = {url: _pairs_of(url) for url in self._urls}
        self._check_room({pair: _state_in_store(pair) for each in pairs.values() for pair in each})
        write_text(self._listing, json.dumps(pairs, indent=1) + "\n")
        return pairs

    def found(self) -> dict[str, list[str]]:
        """Return what :meth:`find` found in another process of this host."""
        return read_cached_object(self._listing)

    def local_prefix(self, pair: str) -> str:
        """Return the prefix of the copy of a pair."""
        return str(path_below(self._cache_dir / _FOLDER, pair))

    def fetch(self, pair: str) -> str:
        """Copy a pair, unless its copy is what the store has; return the prefix of the copy.

        Sizes are compared with the store's, and hashes with the manifest's if it has one. A file
        gets its name when both are complete and verified.

        Raises:
            DataError: the store cannot be read, the disk is full, or what was copied is not what
                the store or the manifest says.
        """
        local = self.local_prefix(pair)
        state, record = _state_in_store(pair), _record_of(local)
        _fetch_manifests(pair, Path(local))
        if not _is_copy(local, state):
            record.unlink(missing_ok=True)
            _copy(pair, local, state)
            write_text(record, json.dumps(state, indent=1) + "\n")
        return local

    def _check_room(self, states: dict[str, dict[str, Any]]) -> None:
        """Check that the disk has room for what is to be copied."""
        missing = [s for pair, s in states.items() if not _is_copy(self.local_prefix(pair), s)]
        needed = sum(file["bytes"] for state in missing for file in state.values())
        self._listing.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self._cache_dir).free
        if needed > free:
            raise DataError(
                f"The token files in stores need {needed:,} bytes in `data.cache_dir` "
                f"({self._cache_dir}), which has {free:,} free; make room, or choose another folder"
            )


def _pairs_of(url: str) -> list[str]:
    """Return the URL itself, or the URLs of all pairs that match it."""
    if not glob.has_magic(url):
        return [url]
    store, pattern = open_store(url, DataError)
    with store_errors(url, DataError):
        matches = [store.unstrip_protocol(path) for path in sorted(store.glob(f"{pattern}.idx"))]
    if not matches:
        raise DataError(
            f"`{url}` must name at least one token file; nothing in the store matches {url}.idx"
        )
    return [match.removesuffix(".idx") for match in matches]


def _state_in_store(pair: str) -> dict[str, Any]:
    """Return size and version of ``.bin`` and ``.idx``."""
    state = {}
    for ending in _ENDINGS:
        store, path = open_store(pair + ending, DataError)
        with store_errors(pair + ending, DataError):
            info = store.info(path)
        state[ending] = {"bytes": info["size"], "version": file_version(info)}
    return state


def _record_of(local: str) -> Path:
    """Return the file that says which version of a pair was copied, written last."""
    return Path(f"{local}.copied.json")


def _is_copy(local: str, state: dict[str, Any]) -> bool:
    """Return whether a pair on disk is the complete copy of the one in the store."""
    sizes = [path.stat().st_size if path.is_file() else None for path in pair_paths(local)]
    expected = [state[ending]["bytes"] for ending in _ENDINGS]
    return read_cached_object(_record_of(local)) == state and sizes == expected


def _copy(pair: str, local: str, state: dict[str, Any]) -> None:
    paths = pair_paths(local)
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    hashes = _hashes_in_manifest(Path(local))
    # Names that the next start overwrites, should this one be killed: the files may be large.
    with renamed_when_complete(*paths, folder=paths[0].parent) as temporary:
        for ending, path in zip(_ENDINGS, temporary, strict=True):
            url = pair + ending
            store, root = open_store(url, DataError)
            with store_errors(url, DataError), full_disk_explained(Path(local + ending)):
                store.get_file(root, str(path))
            _check(url, path, state[ending]["bytes"], hashes.get(ending))
        if _state_in_store(pair) != state:
            raise DataError(f"{pair} has changed in the store while it was copied; start again")


def _check(url: str, path: Path, num_bytes: int, sha256: str | None) -> None:
    size = path.stat().st_size
    if size != num_bytes:
        raise DataError(f"{url} has {num_bytes:,} bytes, and {size:,} were copied; start again")
    if sha256 is not None and (actual := sha256_of(path)) != sha256:
        raise DataError(
            f"{url} has SHA-256 {actual}, but its manifest says {sha256}: it was replaced or "
            "damaged after the manifest was written; upload both again, or delete the manifest to "
            "use the pair without it"
        )


def _fetch_manifests(pair: str, local: Path) -> None:
    """Copy the files that may describe a pair; delete copies of those that are gone."""
    folder, _, name = pair.rpartition("/")
    for manifest in manifest_names(name):
        url, copy = f"{folder}/{manifest}", local.with_name(manifest)
        store, path = open_store(url, DataError)
        with store_errors(url, DataError):
            if store.exists(path):
                write_text(copy, store.cat_file(path).decode())
            else:
                copy.unlink(missing_ok=True)


def _hashes_in_manifest(local: Path) -> dict[str, str]:
    """Return the SHA-256 of ``.bin`` and ``.idx`` from the manifest; empty without one."""
    path = find_manifest(local)
    record = read_manifest(path).pair(local.name) if path is not None else None
    return {} if record is None else {".bin": record.bin_sha256, ".idx": record.idx_sha256}
