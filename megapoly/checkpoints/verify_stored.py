"""Verify checkpoints in object stores: every byte is read from there, and none is kept."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from megapoly.checkpoints.crc32 import crc32
from megapoly.checkpoints.object_store import complete_in_store
from megapoly.checkpoints.run_file import (
    NAME,
    DamageError,
    is_sealed,
    read_run_file,
    sealed_files,
)
from megapoly.checkpoints.verify import Verdict
from megapoly.errors import CheckpointError
from megapoly.platform.stores import open_store, store_errors

_AT_ONCE = 16 << 20


def stored_checkpoints(url: str) -> list[str]:
    """Return the URLs of the complete checkpoints of a run, oldest first, or the URL of one itself.

    Raises:
        CheckpointError: there is none, or the store fails.
        UnavailableError: the package for this kind of store is not installed.
    """
    found = complete_in_store(url)
    if not found:
        raise CheckpointError(
            f"{url} has no complete checkpoint: give the URL of an `iter_*` folder with a {NAME}, "
            "or of a run with such folders"
        )
    return found[::-1]


def verify_stored(url: str) -> tuple[Verdict, int]:
    """Compare the files of a checkpoint in a store with its ``run.json``.

    Args:
        url: of the checkpoint.

    Returns:
        What was found, and the bytes of the files by ``run.json``.

    Raises:
        CheckpointError: the store fails.
    """
    store, root = open_store(url, CheckpointError)
    with store_errors(url, CheckpointError), TemporaryDirectory() as folder:
        (Path(folder) / NAME).write_bytes(store.cat_file(f"{root}/{NAME}"))
        try:
            run = read_run_file(Path(folder))
            if not is_sealed(run):
                return Verdict(is_sealed=False), 0
            files = sealed_files(run)
        except DamageError as error:
            return Verdict(((error.file, error.reason),)), 0
        damages = []
        for name, (num_bytes, crc) in sorted(files.items()):
            reason = _damage(store, f"{root}/{name}", num_bytes, crc)
            damages += [(name, reason)] if reason else []
    total = sum(num_bytes for num_bytes, _ in files.values())
    return Verdict(tuple(damages), files=(NAME, *files)), total


def _damage(store: Any, path: str, num_bytes: int, crc: str) -> str:
    """Return what is wrong with a file, to follow its name; empty if it is whole."""
    found, size = 0, 0
    try:
        with store.open(path, "rb") as stream:
            while part := stream.read(_AT_ONCE):
                found, size = crc32(part, found), size + len(part)
    except FileNotFoundError:
        return "is missing"
    if size != num_bytes:
        return f"has {size:,} bytes, not {num_bytes:,}"
    if f"{found:08x}" != crc:
        return "is damaged (another CRC-32 than when it was written)"
    return ""
