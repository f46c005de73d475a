"""Copy checkpoints to and from object stores: ``s3://``, ``gs://`` and every other of fsspec.

A run has the same names there as in a folder: ``URL/checkpoints/iter_0000100``. Its ``run.json`` is
written last, so that a checkpoint is complete in the store, too, when it has one.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec

from megapoly.checkpoints.run_file import NAME as RUN
from megapoly.checkpoints.run_file import DamageError, is_sealed, read_run_file, sealed_files
from megapoly.checkpoints.run_folder import checkpoints_folder, iteration_of, partial_path
from megapoly.checkpoints.verify import verify
from megapoly.errors import CheckpointError, UnavailableError

Advance = Callable[[str], None]


def is_url(place: str) -> bool:
    """Return whether a run or checkpoint is in a store and not in a folder."""
    return "://" in place


def upload(checkpoint: Path, run_url: str, advance: Advance = lambda file: None) -> str:
    """Copy a checkpoint to a run in a store, after verifying it.

    Args:
        checkpoint: an ``iter_*`` folder.
        run_url: of the run.
        advance: called with the name of each file before it is copied.

    Returns:
        The URL of the checkpoint.

    Raises:
        CheckpointError: the checkpoint is damaged, the store has another one of this name, or the
            store fails.
        UnavailableError: the package for this kind of store is not installed.
    """
    url = f"{run_url.rstrip('/')}/{checkpoints_folder('').name}/{checkpoint.name}"
    files = [*_whole_files(checkpoint), RUN]
    with _explained(url):
        store, root = fsspec.url_to_fs(url)
        if store.exists(f"{root}/{RUN}"):
            if store.cat_file(f"{root}/{RUN}") == (checkpoint / RUN).read_bytes():
                return url
            raise CheckpointError(f"{url} is another checkpoint; delete it, or choose another URL")
        bucket = root[: root.index("/", 1)]
        if not store.exists(bucket):  # `makedirs` would make one of a mistyped name
            raise CheckpointError(f"{bucket} cannot be seen; make it, or choose another URL")
        for name in files:
            advance(name)
            target = f"{root}/{name}"
            store.makedirs(target.rpartition("/")[0], exist_ok=True)
            store.put_file(str(checkpoint / name), target)
            _check_size(store, target, (checkpoint / name).stat().st_size)
    return url


def download(url: str, run_dir: Path, advance: Advance = lambda file: None) -> Path:
    """Copy a checkpoint from a store to a run, and verify it there.

    Args:
        url: of a checkpoint, or of a run, whose newest complete one is taken.
        run_dir: of the run that gets it.
        advance: called with the name of each file before it is copied.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: there is no complete checkpoint, it is damaged, or the store fails.
        UnavailableError: the package for this kind of store is not installed.
    """
    with _explained(url):
        store, path = fsspec.url_to_fs(url)
        root = _newest(store, path.rstrip("/"), url)
        final = checkpoints_folder(run_dir) / root.rpartition("/")[2]
        if final.exists():
            raise CheckpointError(f"{final} exists; delete it, or choose another run")
        partial = partial_path(final)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            store.get_file(f"{root}/{RUN}", str(partial / RUN))
            for name in _files(partial):
                advance(name)
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                store.get_file(f"{root}/{name}", str(partial / name))
            _whole_files(partial)
            partial.rename(final)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return final


def _newest(store: Any, root: str, url: str) -> str:
    """Return the path of a checkpoint, or of the newest complete one of a run."""
    if iteration_of(root.rpartition("/")[2]) is not None:
        candidates = [root]
    else:
        folder = f"{root}/{checkpoints_folder('').name}"
        found = store.ls(folder, detail=False) if store.exists(folder) else []
        names = [path.rstrip("/") for path in found]
        steps = ((iteration_of(path.rpartition("/")[2]), path) for path in names)
        by_step = {step: path for step, path in steps if step is not None}
        candidates = [by_step[step] for step in sorted(by_step, reverse=True)]
    for candidate in candidates:
        if store.exists(f"{candidate}/{RUN}"):
            return candidate
    raise CheckpointError(
        f"{url} has no complete checkpoint: give the URL of an `iter_*` folder with a {RUN}, or of "
        f"a run with such folders in `{checkpoints_folder('').name}`"
    )


def _files(folder: Path) -> list[str]:
    """Return the names that the ``run.json`` of a checkpoint lists."""
    try:
        run = read_run_file(folder)
        if is_sealed(run):
            return list(sealed_files(run))
    except DamageError as error:
        raise CheckpointError(f"the checkpoint is damaged: {error}") from error
    raise CheckpointError("its run.json has no sizes and CRC-32: it cannot be verified")


def _whole_files(folder: Path) -> list[str]:
    files, verdict = _files(folder), verify(folder)
    if verdict.damages:
        raise CheckpointError(f"the checkpoint is damaged: {verdict}")
    return files


def _check_size(store: Any, path: str, num_bytes: int) -> None:
    size = store.info(path)["size"]
    if size != num_bytes:
        raise CheckpointError(f"{path} has {size} bytes in the store and not {num_bytes}")


@contextlib.contextmanager
def _explained(url: str) -> Iterator[None]:
    """Turn what a store raises into a sentence; each kind of store has its own exceptions."""
    try:
        yield
    except CheckpointError as error:
        text = str(error)
        raise CheckpointError(text if url in text else f"{url}: {text}") from error
    except ImportError as error:
        raise UnavailableError(
            f"{url} needs a package of fsspec for its kind of store: {error}"
        ) from error
    except Exception as error:
        raise CheckpointError(f"{url}: {type(error).__name__}: {error}") from error
