"""Copy checkpoints to and from object stores: ``s3://``, ``gs://`` and every other of fsspec.

A run has the same names there as in a folder: ``URL/checkpoints/iter_0000100``. Its ``run.json`` is
written last, so that a checkpoint is complete in the store, too, when it has one.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megapoly.checkpoints.choose import verdict_of
from megapoly.checkpoints.run_file import NAME as RUN
from megapoly.checkpoints.run_file import DamageError, is_sealed, read_run_file, sealed_files
from megapoly.checkpoints.run_folder import checkpoints_folder, iteration_of, partial_path
from megapoly.checkpoints.verify import verify
from megapoly.errors import CheckpointError
from megapoly.platform.files import full_disk_explained, write_text
from megapoly.platform.stores import open_store, path_below, store_errors

logger = logging.getLogger(__name__)

Advance = Callable[[str], None]
_CHOSEN = "chosen"


class _DamagedError(CheckpointError):
    """A checkpoint is not what its ``run.json`` says."""


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
    _check_whole(checkpoint)
    files = [*_files(checkpoint), RUN]
    store, root = open_store(url, CheckpointError)
    with store_errors(url, CheckpointError):
        if store.exists(f"{root}/{RUN}"):
            if store.cat_file(f"{root}/{RUN}") == (checkpoint / RUN).read_bytes():
                return url
            raise CheckpointError(f"{url} is another checkpoint; delete it, or choose another URL")
        _check_bucket(store, root)
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
        url: of a checkpoint, or of a run, whose newest one that is whole is taken.
        run_dir: of the run that gets it.
        advance: called with the name of each file before it is copied.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: there is no complete checkpoint, all are damaged, the run has one of this
            name, the disk has no room, or the store fails.
        UnavailableError: the package for this kind of store is not installed.
    """

    def copy(store: Any, root: str, final: Path) -> None:
        if final.exists():
            raise CheckpointError(f"{final} exists; delete it, or choose another run")
        _copy(store, root, final, advance)

    return _newest_whole(url, run_dir, copy)


def fetch(url: str, cache: Path, advance: Advance = lambda file: None) -> Path:
    """Return the copy of a checkpoint in a cache; copy and verify it unless it is there.

    Args:
        url: of a checkpoint, or of a run, whose newest one that is whole is taken.
        cache: folder for copies; one process at a time calls this for it.
        advance: called with the name of each file before it is copied.

    Raises:
        CheckpointError: as :func:`download`, but for a checkpoint that is there.
        UnavailableError: the package for this kind of store is not installed.
    """

    def copy(store: Any, root: str, final: Path) -> None:
        if final.exists():
            same = (final / RUN).is_file() and (final / RUN).read_bytes() == store.cat_file(
                f"{root}/{RUN}"
            )
            if same and not verdict_of(final).damages:
                return
            shutil.rmtree(final)
        _copy(store, root, final, advance)

    final = _newest_whole(url, run_folder_of(url, cache), copy)
    write_text(run_folder_of(url, cache) / _CHOSEN, final.name)
    return final


def fetched(url: str, cache: Path) -> Path:
    """Return what :func:`fetch` returned last, in any process."""
    folder = run_folder_of(url, cache)
    return checkpoints_folder(folder) / (folder / _CHOSEN).read_text()


def complete_in_store(url: str) -> list[str]:
    """Return the URLs of the complete checkpoints of a run in a store, newest first.

    The URL of a checkpoint is that of this one.

    Raises:
        CheckpointError: the store fails.
        UnavailableError: the package for this kind of store is not installed.
    """
    store, root = open_store(url, CheckpointError)
    with store_errors(url, CheckpointError):
        return [store.unstrip_protocol(path) for path in _complete(store, root)]


def newest_in_store(url: str) -> str | None:
    """Return the name of the newest complete checkpoint of a run in a store; None without one.

    Raises:
        CheckpointError: the store fails, or has no such bucket.
        UnavailableError: the package for this kind of store is not installed.
    """
    store, root = open_store(url, CheckpointError)
    with store_errors(url, CheckpointError):
        _check_bucket(store, root)
        newest = next(_complete(store, root), None)
    return None if newest is None else newest.rpartition("/")[2]


def _newest_whole(url: str, run_dir: Path, copy: Callable[[Any, str, Path], None]) -> Path:
    """Copy the newest checkpoint of a URL that is whole to a run; name damaged ones in lines."""
    store, path = open_store(url, CheckpointError)
    damaged: list[str] = []
    with store_errors(url, CheckpointError):
        for root in _complete(store, path):
            final = checkpoints_folder(run_dir) / root.rpartition("/")[2]
            try:
                copy(store, root, final)
            except _DamagedError as error:
                damaged.append(f"{final.name}: {error}")
                continue
            for line in damaged:
                logger.warning("%s has a damaged checkpoint, %s. %s is used", url, line, final.name)
            return final
    if damaged:
        raise CheckpointError(f"{url} has no checkpoint that is whole. {'; '.join(damaged)}")
    raise CheckpointError(
        f"{url} has no complete checkpoint: give the URL of an `iter_*` folder with a {RUN}, or of "
        f"a run with such folders in `{checkpoints_folder('').name}`"
    )


def _complete(store: Any, root: str) -> Iterator[str]:
    """Yield the paths of complete checkpoints: of a run, newest first, or the path itself."""
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
            yield candidate


def _copy(store: Any, root: str, final: Path, advance: Advance) -> None:
    """Copy a checkpoint to a folder, which appears when it is complete and verified."""
    partial = partial_path(final)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with full_disk_explained(final):
            store.get_file(f"{root}/{RUN}", str(partial / RUN))
            files = _files(partial)
            _check_room(partial, sum(num_bytes for num_bytes, _ in files.values()))
            for name in files:
                advance(name)
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                try:
                    store.get_file(f"{root}/{name}", str(partial / name))
                except FileNotFoundError as error:
                    raise _DamagedError(f"the checkpoint is damaged: {name} is missing") from error
            _check_whole(partial)
            partial.rename(final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def run_folder_of(url: str, cache: Path) -> Path:
    """Return the folder in a cache that stands for the run of a URL."""
    folder = path_below(cache, url)
    return folder if iteration_of(folder.name) is None else folder.parents[1]


def _check_bucket(store: Any, root: str) -> None:
    """Refuse a bucket that is not there; ``makedirs`` would make one of a mistyped name."""
    bucket = root[: root.index("/", 1)]
    if not store.exists(bucket):
        raise CheckpointError(f"{bucket} cannot be seen; make it, or choose another URL")


def _check_room(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise CheckpointError(
            f"the checkpoint has {num_bytes:,} bytes and {free:,} are free in {folder.parent}; "
            "make room, or choose another folder"
        )


def _files(folder: Path) -> dict[str, tuple[int, str]]:
    """Return size and CRC-32 of the files that the ``run.json`` of a checkpoint lists."""
    try:
        run = read_run_file(folder)
        if is_sealed(run):
            return sealed_files(run)
    except DamageError as error:
        raise _DamagedError(f"the checkpoint is damaged: {error}") from error
    raise CheckpointError("its run.json has no sizes and CRC-32: it cannot be verified")


def _check_whole(folder: Path) -> None:
    if (verdict := verify(folder)).damages:
        raise _DamagedError(f"the checkpoint is damaged: {verdict}")


def _check_size(store: Any, path: str, num_bytes: int) -> None:
    size = store.info(path)["size"]
    if size != num_bytes:
        raise CheckpointError(f"{path} has {size} bytes in the store and not {num_bytes}")
