"""Atomic writes: a file appears under its final name when it is complete, or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from megapoly.errors import DataError

_OUT_OF_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# A disk that is read-only, broken or gone, such as a file server's.
_OUT_OF_REACH = {errno.EROFS, errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ENODEV, errno.ENXIO}
# A folder has the file's name, a file the folder's, or another user owns it.
_IN_THE_WAY = {errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP}
_NOT_ALLOWED = {errno.EACCES, errno.EPERM}
# Until a host sees what another one has written. A client of NFS remembers for 30 to 60 s what a
# folder holds (acdirmin, acdirmax).
SEEN_WITHIN_S = 60.0
_PAUSE_S = 0.1


def is_file(path: str | Path) -> bool:
    """Return whether a file can be seen; False, too, if it is out of reach or too long a name."""
    return os.path.isfile(path)


def is_folder(path: str | Path) -> bool:
    """Return whether a folder can be seen; see :func:`is_file`."""
    return os.path.isdir(path)


def why_missing(path: str | Path) -> str:
    """Return why a file or folder cannot be used, to follow its name; empty if it exists."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return "does not exist"
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        return f"cannot be opened ({reason})"
    return ""


def is_plain_name(name: object) -> bool:
    """Return whether a name that a file gives is that of a file beside it, and no path."""
    return isinstance(name, str) and name not in ("", ".", "..") and os.path.basename(name) == name


@contextmanager
def renamed_when_complete(*paths: Path, folder: Path | None = None) -> Iterator[list[Path]]:
    """Yield temporary names for ``paths``; rename them, in order, if the body succeeds.

    Args:
        *paths: final names.
        folder: existing folder on the same disk, which only this process uses, for the temporary
            files ``NAME.partial``; None: hidden files with unique names next to ``paths``.

    Raises:
        DataError: the disk is full, read-only or gone, something else has the name of a file or of
            its folder, or the user may not write there; the temporary files are deleted.
    """
    if folder is None:
        suffix = f".{uuid.uuid4().hex[:8]}.tmp"
        temporary = [path.with_name(f".{path.name}{suffix}") for path in paths]
    else:
        temporary = [folder / f"{path.name}.partial" for path in paths]
    try:
        with full_disk_explained(*paths):
            for path in paths:
                path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            for path in temporary:
                _flush_to_disk(path)
            for source, target in zip(temporary, paths, strict=True):
                os.replace(source, target)
    finally:
        for path in temporary:
            with suppress(OSError):  # a disk that is gone
                path.unlink(missing_ok=True)


@contextmanager
def full_disk_explained(*paths: Path) -> Iterator[None]:
    """Turn the operating system's reason why a file cannot be written into a DataError."""
    try:
        yield
    except OSError as error:
        if error.errno in _OUT_OF_SPACE:
            raise DataError(
                f"No space is left to write `{paths[0]}`: {os.strerror(error.errno)}, "
                f"{free_space(paths[0])}. No incomplete file has the final name; free some space "
                "and run the same command again."
            ) from error
        if error.errno in _OUT_OF_REACH:
            raise DataError(
                f"`{paths[0]}` cannot be written: {os.strerror(error.errno)}. No incomplete file "
                "has the final name; make the disk writable, or choose another folder, and run the "
                "same command again."
            ) from error
        if error.errno in _IN_THE_WAY | _NOT_ALLOWED:
            name = error.filename2 or error.filename or paths[0]
            raise DataError(
                f"`{paths[0]}` cannot be written: {os.strerror(error.errno)} ({name}). Move what "
                "has this name, or choose another folder that you may write to, and run the same "
                "command again."
            ) from error
        raise


def free_space(path: Path) -> str:
    """Return how much room there is for a file, as a part of a sentence."""
    try:
        folder = next(p for p in path.absolute().parents if p.is_dir())
        return f"{shutil.disk_usage(folder).free:,} bytes are free in {folder}"
    except OSError as error:
        return f"the room on its disk is not known ({error.strerror})"


def wait_until_seen(
    folder: Path, sizes: Mapping[str, int | None], limit_s: float
) -> dict[str, str]:
    """Wait for files that other hosts have written, which a file system may show late.

    Args:
        folder: of the files.
        sizes: in bytes, by name; None: of any size, also a folder.
        limit_s: longest wait.

    Returns:
        What this host sees of the files that are not there by then, to follow their names.
    """
    deadline = time.monotonic() + limit_s
    unseen = _unseen(folder, sizes)
    while unseen and time.monotonic() < deadline:
        time.sleep(_PAUSE_S)
        refresh_listing(folder)
        unseen = _unseen(folder, {name: sizes[name] for name in unseen})
    return unseen


def refresh_listing(folder: Path) -> None:
    """List a folder, or the nearest above it that can be: a client of NFS then asks the server."""
    for each in (folder, *folder.absolute().parents):
        with suppress(OSError):
            os.listdir(each)
            return


def _unseen(folder: Path, sizes: Mapping[str, int | None]) -> dict[str, str]:
    found = {}
    for name, expected in sizes.items():
        try:
            size = os.stat(folder / name).st_size
        except OSError:
            found[name] = "is missing"
        else:
            if expected not in (None, size):
                found[name] = f"has {size:,} bytes"
    return found


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with renamed_when_complete(path) as (temporary,):
        temporary.write_text(text, encoding="utf-8")


def replace_text(path: Path, text: str, *, mode: int | None = None) -> None:
    """Replace a small file that is written again and again; readers see the old or the new one.

    It is not flushed to the disk, and its folder not made. One process at a time may write it. On a
    full disk, which has no room for a second file, the text is written over the old one: a reader
    may then see a part of it.

    Args:
        path: of the file.
        text: its content.
        mode: permissions of the file; None: as of every new file.

    Raises:
        OSError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        if mode is not None:
            partial.chmod(mode)
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        if error.errno not in _OUT_OF_SPACE or not path.exists():
            raise
        with path.open("r+b") as stream:
            stream.write(text.encode())
            stream.truncate()


def _flush_to_disk(path: Path) -> None:
    """Flush the content before the rename; otherwise a power failure may leave an empty file."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
