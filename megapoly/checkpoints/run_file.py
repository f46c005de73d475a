"""``run.json`` of a checkpoint: position of the run, and sizes and CRC-32 of all files."""

from __future__ import annotations

import json
import zlib
from pathlib import Path, PurePosixPath
from typing import Any

NAME = "run.json"
# Keys of the seal: the files, and the CRC-32 of the file's own content.
FILES, OWN_CRC = "files", "crc32"


class DamageError(Exception):
    """A file of a checkpoint is missing, cannot be read, or is not what was written.

    Args:
        file: its name in the checkpoint's folder.
        reason: what is wrong, to follow the name.
    """

    def __init__(self, file: str, reason: str):
        self.file, self.reason = file, reason
        super().__init__(f"{file} {reason}")


def run_text(run: dict[str, Any]) -> str:
    """Return the text of a sealed ``run.json``, with a CRC-32 of its content at the end."""
    content = {key: value for key, value in run.items() if key != OWN_CRC}
    crc = zlib.crc32(json.dumps(content).encode())
    return json.dumps(content | {OWN_CRC: f"{crc:08x}"}, indent=2) + "\n"


def read_run_file(folder: Path) -> dict[str, Any]:
    """Return the content of ``run.json``; if it is sealed, every byte of it is proven.

    Raises:
        DamageError: it is missing, cannot be read, or is not what was written.
    """
    try:
        data = (folder / NAME).read_bytes()
    except OSError as error:
        raise DamageError(NAME, why_unreadable(error)) from error
    try:
        run = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DamageError(NAME, f"is damaged ({error})") from error
    if not isinstance(run, dict):
        raise DamageError(NAME, "is damaged (it is no object)")
    if is_sealed(run) and run_text(run).encode() != data:
        raise DamageError(NAME, "is damaged (its content has another CRC-32 than it says)")
    return run


def is_sealed(run: dict[str, Any]) -> bool:
    """Return whether a ``run.json`` has sizes and CRC-32 of the checkpoint's files."""
    return FILES in run or OWN_CRC in run


def sealed_files(run: dict[str, Any]) -> dict[str, tuple[int, str]]:
    """Return size in bytes and CRC-32 of each file of a sealed checkpoint, by its name.

    Raises:
        DamageError: the list is not one of :func:`megapoly.checkpoints.seal.seal`.
    """
    try:
        files = {name: (int(of["bytes"]), str(of["crc32"])) for name, of in run[FILES].items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DamageError(NAME, f"is damaged (its list of files: {error!r})") from error
    for name in files:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise DamageError(NAME, f"names `{name}`, which is not in the checkpoint's folder")
    return files


def why_unreadable(error: OSError) -> str:
    """Return why a file cannot be read, to follow its name."""
    if isinstance(error, FileNotFoundError):
        return "is missing"
    if isinstance(error, IsADirectoryError):
        return "is a folder"
    return f"cannot be read ({error.strerror})"
