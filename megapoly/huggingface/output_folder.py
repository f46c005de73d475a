"""The folder that a conversion writes: whole and proven, or not there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megapoly.data.files import full_disk_explained
from megapoly.errors import CheckpointError
from megapoly.huggingface.parity import ParityError


@contextmanager
def output_folder(output: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield a hidden folder beside ``output``; rename it if the body succeeds.

    Args:
        output: the folder's final name.
        overwrite: replace it if it exists, at the end.

    Raises:
        CheckpointError: it exists.
        DataError: the disk is full.
        ParityError: of the body; what was written is kept as ``OUTPUT.failed``.
    """
    output = output.absolute()
    if output.exists() and not overwrite:
        raise CheckpointError(
            f"`--output` ({output}) exists; name another folder, or add --overwrite to replace it."
        )
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with full_disk_explained(output):
            partial.mkdir(parents=True)
            yield partial
        _replace(partial, output)
    except ParityError as error:
        failed = output.with_name(f"{output.name}.failed")
        _replace(partial, failed)
        raise ParityError(f"{error} What was written is kept in {failed}.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replace(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    source.rename(target)
