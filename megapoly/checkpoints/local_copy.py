"""Copies of checkpoints in object stores, for commands that open a model."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from megapoly.checkpoints.object_store import fetch, fetched, run_folder_of
from megapoly.checkpoints.verify import ALONE, Ranks
from megapoly.errors import CheckpointError
from megapoly.platform.stores import cache_folder, is_url, sole_process


def local_model(place: str | Path, ranks: Ranks = ALONE, local_rank: int = 0) -> Path:
    """Return the folder of a model: of a URL its copy, which is made and verified; collective.

    Args:
        place: folder; or URL of a checkpoint, or of a run, whose newest one that is whole is taken.
        ranks: processes that call this.
        local_rank: number of this process on its host, whose first one copies.

    Raises:
        CheckpointError: there is no whole checkpoint, the store fails, another process copies the
            same one for more than an hour, or hosts find different ones.
        UnavailableError: the package for this kind of store is not installed.
    """
    if not is_url(place):
        return Path(place)
    url, cache, path = str(place), cache_folder() / "stores", None
    if local_rank == 0:
        with (
            sole_process(run_folder_of(url, cache), CheckpointError),
            Console(stderr=True).status(f"reading {url}") as status,
        ):
            path = fetch(url, cache, lambda file: status.update(f"copying {file} of {url}"))
    found = [name for name in ranks.gather("" if path is None else path.name) if name]
    if len({*found}) > 1:
        raise CheckpointError(
            f"hosts find different newest checkpoints of {url}: {', '.join(sorted({*found}))}; "
            "give the URL of one of them"
        )
    return path or fetched(url, cache)
