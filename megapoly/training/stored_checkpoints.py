"""Checkpoints that a run starts from and that are in an object store, copied before it loads them.

A run with ``checkpoint.upload`` and an empty ``run_dir`` resumes from the store: its host may be
another one than before.
"""

from __future__ import annotations

import logging
import shutil
from functools import partial
from pathlib import Path

from megapoly.checkpoints.choose import is_checkpoint
from megapoly.checkpoints.object_store import download, fetch, fetched, newest_in_store
from megapoly.checkpoints.run_folder import checkpoint_names
from megapoly.config import Config
from megapoly.errors import CheckpointError
from megapoly.platform.stores import is_url
from megapoly.training.load_checkpoint import check_model
from megapoly.training.rank_zero_first import RankZeroFirst

logger = logging.getLogger(__name__)


def copy_from_stores(config: Config, rank_zero_first: RankZeroFirst) -> Path | None:
    """Copy the checkpoint that a run starts from, if that is in a store; on all ranks.

    Without a checkpoint in ``run_dir`` that is the newest whole one of ``checkpoint.upload``, which
    is copied to ``run_dir``, and if there is none, that of ``checkpoint.load``.

    Returns:
        The copy of ``checkpoint.load``; None if that is no URL or is not needed.

    Raises:
        CheckpointError: a checkpoint is damaged or of another model, ``checkpoint.resume`` is false
            and ``checkpoint.upload`` has a checkpoint, or the store fails.
        PeerError: another rank failed.
    """
    upload, load = config.checkpoint.upload, config.checkpoint.load
    if upload is not None:
        copy = partial(_resume, config, upload, rank_zero_first)
        # All hosts share `run_dir`, and may see late what is copied there.
        rank_zero_first.run(
            f"look for a checkpoint in {upload}",
            copy if rank_zero_first.rank == 0 else lambda: None,
        )
    if load is None or not is_url(load):
        return None
    cache = Path(config.data.cache_dir or Path(config.run_dir) / "cache", "stores")

    if rank_zero_first.told(
        "look for checkpoints of the run", lambda: "found" if _has_checkpoint(config) else ""
    ):
        return None
    found = rank_zero_first.run(
        f"copy {load}",
        partial(fetch, load, cache, rank_zero_first.advance),
        partial(fetched, load, cache),
    )
    rank_zero_first.check_same("checkpoint", found.name)
    return found


def _has_checkpoint(config: Config) -> bool:
    return any(map(is_checkpoint, checkpoint_names(config.run_dir)))


def _resume(config: Config, url: str, rank_zero_first: RankZeroFirst) -> None:
    """Copy the newest whole checkpoint of the run's store to its folder, if that has none."""
    if _has_checkpoint(config):
        return
    newest = newest_in_store(url)
    if newest is None:
        return
    if not config.checkpoint.resume:
        raise CheckpointError(
            f"`checkpoint.resume` is false and `checkpoint.upload` ({url}) has {newest}; choose "
            "another URL, or set it to true to resume from there"
        )
    logger.info("%s has no checkpoint: %s of %s is copied there", config.run_dir, newest, url)
    path = download(url, Path(config.run_dir), rank_zero_first.advance)
    try:
        check_model(config, path)
    except CheckpointError as error:
        shutil.rmtree(path)  # a copy
        raise CheckpointError(f"`checkpoint.upload` ({url}) is another run's: {error}") from error
    logger.info("resumes from %s, copied from %s and verified", path.name, url)
