"""The work folder of an unfinished run: its plan, and a lock that admits one process."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from megapoly.data.preprocess.options import PreprocessOptions
from megapoly.data.preprocess.source_files import SourceFile
from megapoly.errors import DataError
from megapoly.platform import locks
from megapoly.platform.files import full_disk_explained, write_text
from megapoly.platform.locks import at_most

if TYPE_CHECKING:
    from megapoly.data.preprocess.tokenization import TokenizerSettings

logger = logging.getLogger(__name__)

# A worker whose parent was killed ends when it sends its next message.
_LOCK_WAIT_S = 20.0


def plan_of(
    options: PreprocessOptions,
    sources: Sequence[SourceFile],
    settings: TokenizerSettings,
    backend: str,
) -> dict[str, Any]:
    """Return everything that determines the bytes of a run and how it is split into parts."""
    return {
        "arguments": options.arguments(),
        "tokenizer": settings.sha256,
        "added_ids": [settings.eod, settings.prefix, settings.suffix, settings.dtype.name],
        "tokenizer_backend": backend,
        "part_bytes": options.part_bytes_of(sum(source.size_bytes for source in sources)),
        "chunk_bytes": options.chunk_bytes,
        "sources": [[str(s.path), s.size_bytes, s.modified_ns] for s in sources],
    }


def open_work_folder(folder: Path, plan: Mapping[str, Any], *, restart: bool) -> bool:
    """Prepare the work folder of a run, or resume the run in it.

    Args:
        folder: folder of the shards; locked.
        plan: plan of this run.
        restart: delete what the folder contains.

    Returns:
        Whether the folder holds an interrupted run.

    Raises:
        DataError: the folder holds a run with another plan.
    """
    path = plan_path(folder)
    plan = json.loads(json.dumps(plan))
    if restart or not path.is_file():
        # Without a plan: left by a finished run, or a restart, that was killed while deleting.
        path.unlink(missing_ok=True)
        for old in folder.iterdir():
            if old.name != "lock":
                old.unlink()
    if path.is_file():
        found = json.loads(path.read_text())
        different = [key for key in plan if plan[key] != found.get(key)]
        if different:
            raise DataError(
                f"`{folder}` holds an interrupted run that differs in: {', '.join(different)}"
                f"{_difference(found, plan, different[0])}. Run that command again to finish it, "
                "or delete its work with --restart."
            )
        return True
    write_text(path, json.dumps(plan, indent=1))
    return False


def _difference(found: Mapping[str, Any], plan: Mapping[str, Any], key: str) -> str:
    before, now = found.get(key), plan[key]
    if key == "sources" and isinstance(before, list):
        changed = [new[0] for old, new in zip(before, now, strict=False) if old != new]
        return f" ({len(before)} files then, {len(now)} now; first difference: {changed[:1]})"
    if isinstance(now, dict) and isinstance(before, dict):
        changed = [
            f"{k}: {before.get(k)} then, {v} now" for k, v in now.items() if before.get(k) != v
        ]
        return f" ({'; '.join(changed)})"
    return f" ({before} then, {now} now)"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Create a folder and lock it against other processes.

    Raises:
        DataError: another process holds the lock.
    """

    def refusal(file: IO[str]) -> DataError:
        return DataError(
            f"Another process is using `{folder}`; wait until it has finished, or choose another "
            "--output-prefix."
        )

    path = folder / "lock"
    with ExitStack() as held:
        with full_disk_explained(path):
            lock = held.enter_context(locks.locked(path, at_most(_LOCK_WAIT_S, refusal)))
        if lock.missing:
            logger.warning(
                "This disk does not support locks: two simultaneous runs with one --output-prefix "
                "are not detected."
            )
        yield


def plan_path(folder: Path) -> Path:
    """Return the file that describes the run of a folder; it exists while the run is unfinished."""
    return folder / "plan.json"


def remove_work_folder(folder: Path) -> None:
    """Delete the folder of a finished run, the plan first: half a folder must not be resumed."""
    plan_path(folder).unlink(missing_ok=True)
    shutil.rmtree(folder)
