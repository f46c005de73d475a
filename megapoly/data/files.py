"""Files that are whole or not there: temporary names, renames, a full disk."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from megapoly.errors import DataError

_OUT_OF_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def renamed_when_complete(*paths: Path) -> Iterator[list[Path]]:
    """Yield temporary names beside ``paths``; rename them, in order, if the body succeeds.

    Raises:
        DataError: the disk is full; nothing of what was written is left.
    """
    suffix = f".{uuid.uuid4().hex[:8]}.tmp"
    temporary = [path.with_name(f".{path.name}{suffix}") for path in paths]
    try:
        with full_disk_explained(*paths):
            for path in paths:
                path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            for source, target in zip(temporary, paths, strict=True):
                _to_disk(source)
                os.replace(source, target)
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)


@contextmanager
def full_disk_explained(*paths: Path) -> Iterator[None]:
    """Turn the operating system's "no space left" into a :class:`DataError` with the figures."""
    try:
        yield
    except OSError as error:
        if error.errno not in _OUT_OF_SPACE:
            raise
        folder = next(p for p in paths[0].absolute().parents if p.is_dir())
        raise DataError(
            f"No space is left to write `{paths[0]}`: {os.strerror(error.errno)}, "
            f"{shutil.disk_usage(folder).free:,} bytes are free in {folder}. Nothing half-made "
            "stands under the final name; make room and start the same command again."
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a text file under a temporary name and rename it."""
    with renamed_when_complete(path) as (temporary,):
        temporary.write_text(text, encoding="utf-8")


def save_arrays(arrays: dict[Path, np.ndarray]) -> None:
    """Write ``.npy`` files, all under temporary names before the first gets its own."""
    with renamed_when_complete(*arrays) as temporary:
        for path, array in zip(temporary, arrays.values(), strict=True):
            with path.open("wb") as stream:
                np.save(stream, array)


def _to_disk(path: Path) -> None:
    """A rename may reach the disk before the content does; a power failure then leaves a hole."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
