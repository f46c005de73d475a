"""The folder that a conversion writes: whole and proven, or not there."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megapoly.conversion.parity import ParityError
from megapoly.data.files import full_disk_explained
from megapoly.errors import CheckpointError, DataError

# One of these is in every folder that a conversion has written.
_MADE_BY_A_CONVERSION = ("parity.json", "import.json")
# torch's file writer does not say why it failed.
_NO_ROOM_BYTES = 1 << 20


@contextmanager
def output_folder(output: Path, *, source: Path, overwrite: bool) -> Iterator[Path]:
    """Yield a hidden folder beside ``output``; rename it if the body succeeds.

    Args:
        output: the folder's final name.
        source: what is converted.
        overwrite: replace ``output``, at the end, if a conversion has written it.

    Raises:
        CheckpointError: it exists and must not be replaced, or cannot be made.
        DataError: the disk is full.
        ParityError: of the body; what was written is kept as ``OUTPUT.failed``, or with a number
            behind it where that is something else.
    """
    output = output.resolve()
    _check(output, source.resolve(), overwrite)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        name = tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".partial", dir=output.parent)
    except OSError as error:
        raise CheckpointError(f"`--output` ({output}) cannot be made: {error.strerror}") from error
    partial = Path(name)
    partial.chmod(0o777 & ~_umask())
    try:
        with full_disk_explained(output), _full_disk_of_torch(output):
            yield partial
        _check(output, source.resolve(), overwrite)  # another conversion may have been faster
        _replace(partial, output)
    except ParityError as error:
        failed = _name_for_failed(output, source.resolve())
        _replace(partial, failed)
        raise ParityError(f"{error} What was written is kept in {failed}.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check(output: Path, source: Path, overwrite: bool) -> None:
    if output == source or output in source.parents or source in output.parents:
        raise CheckpointError(
            f"`--output` ({output}) must be neither in what is converted ({source}) nor around it; "
            "name another folder."
        )
    if not output.exists():
        return
    if not output.is_dir():
        raise CheckpointError(f"`--output` ({output}) is a file; name a folder.")
    if not any(output.iterdir()):
        return
    if not overwrite:
        raise CheckpointError(
            f"`--output` ({output}) exists; name another folder, or add --overwrite to replace it."
        )
    if not _is_made_by_a_conversion(output):
        raise CheckpointError(
            f"--overwrite replaces what a conversion has written; `--output` ({output}) has none "
            f"of {', '.join(_MADE_BY_A_CONVERSION)}. Name another folder."
        )


def _name_for_failed(output: Path, source: Path) -> Path:
    """A name that nothing has, or what a conversion has written that is not the source."""
    for number in itertools.count():
        name = f"{output.name}.failed" + (f".{number}" if number else "")
        failed = output.with_name(name)
        if failed == source or failed in source.parents:
            continue
        if not os.path.lexists(failed) or _is_made_by_a_conversion(failed):
            return failed
    raise AssertionError


def _is_made_by_a_conversion(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _MADE_BY_A_CONVERSION)


@contextmanager
def _full_disk_of_torch(output: Path) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        free = shutil.disk_usage(output.parent).free
        if free > _NO_ROOM_BYTES:
            raise
        raise DataError(
            f"No space is left to write `{output}`: {free:,} bytes are free. Nothing stands under "
            "this name; make room and start the same command again."
        ) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _replace(source: Path, target: Path) -> None:
    if target.exists():
        shutil.rmtree(target)
    source.rename(target)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write an object, indented; every number in it is finite."""
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
