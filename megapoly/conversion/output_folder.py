"""Output folder of a conversion: complete and proven, or absent."""

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
from megapoly.errors import CheckpointError, DataError
from megapoly.platform.files import full_disk_explained

# Every folder that a conversion has written has one of these.
_CONVERSION_REPORTS = ("parity.json", "import.json")
# torch's file writer does not say why it failed; a disk with less free space is full.
_FULL_DISK_BYTES = 1 << 20


@contextmanager
def output_folder(output: Path, *, source: Path, overwrite: bool) -> Iterator[Path]:
    """Yield a hidden folder next to ``output``; rename it if the body succeeds.

    Args:
        output: final name of the folder.
        source: folder that is converted.
        overwrite: replace ``output``, at the end, if a conversion has written it.

    Raises:
        CheckpointError: ``output`` exists and must not be replaced, or cannot be created.
        DataError: the disk is full.
        ParityError: from the body; the folder is kept as ``OUTPUT.failed``, with a number
            appended if that name is taken by something else.
    """
    output = output.resolve()
    _check(output, source.resolve(), overwrite)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        name = tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".partial", dir=output.parent)
    except OSError as error:
        raise CheckpointError(
            f"`--output` ({output}) cannot be created: {error.strerror}"
        ) from error
    partial = Path(name)
    partial.chmod(0o777 & ~_umask())
    try:
        with full_disk_explained(output), _full_disk_of_torch(output):
            yield partial
        _check(output, source.resolve(), overwrite)  # another conversion may have finished first
        _replace(partial, output)
    except ParityError as error:
        failed = _failed_name(output, source.resolve())
        _replace(partial, failed)
        raise ParityError(f"{error} The result is kept in {failed}.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check(output: Path, source: Path, overwrite: bool) -> None:
    if output == source or output in source.parents or source in output.parents:
        raise CheckpointError(
            f"`--output` ({output}) must neither be in the source ({source}) nor contain it; give "
            "another folder."
        )
    if not output.exists():
        return
    if not output.is_dir():
        raise CheckpointError(f"`--output` ({output}) is a file; give a folder.")
    if not any(output.iterdir()):
        return
    if not overwrite:
        raise CheckpointError(
            f"`--output` ({output}) exists; give another folder, or add --overwrite to replace it."
        )
    if not _is_conversion(output):
        raise CheckpointError(
            f"--overwrite replaces only folders that a conversion has written; `--output` "
            f"({output}) has none of {', '.join(_CONVERSION_REPORTS)}. Give another folder."
        )


def _failed_name(output: Path, source: Path) -> Path:
    """Return a free name, or the name of another conversion's folder; never the source's."""
    for number in itertools.count():
        name = f"{output.name}.failed" + (f".{number}" if number else "")
        failed = output.with_name(name)
        if failed == source or failed in source.parents:
            continue
        if not os.path.lexists(failed) or _is_conversion(failed):
            return failed
    raise AssertionError


def _is_conversion(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _CONVERSION_REPORTS)


@contextmanager
def _full_disk_of_torch(output: Path) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        free = shutil.disk_usage(output.parent).free
        if free > _FULL_DISK_BYTES:
            raise
        raise DataError(
            f"No space is left to write `{output}`: {free:,} bytes are free. Nothing was written "
            "under this name; free some space and run the same command again."
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
    """Write an object as indented JSON; all of its numbers must be finite."""
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
