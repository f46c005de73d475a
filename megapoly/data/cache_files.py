"""Files in ``data.cache_dir``: used if they are whole, and built again if they are damaged."""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megapoly.platform.files import full_disk_explained, write_text

logger = logging.getLogger(__name__)

_PIECE_BYTES = 1 << 20


def built_once(paths: Sequence[Path], sums: Path, build: Callable[[], None]) -> None:
    """Build files unless they are there and are what was built.

    Every call reads the files, about 1 GB/s from the page cache: a flipped bit in an index would be
    another order of the samples.

    Args:
        paths: of the files, in one folder.
        sums: JSON file for their sizes and CRC-32, written last.
        build: writes the files, atomically.

    Raises:
        DataError: from ``build``.
    """
    if not all(path.is_file() for path in (*paths, sums)):
        problem = None
    elif (problem := _problem(paths, sums)) is None:
        return
    if problem is not None:
        logger.warning("%s; it is built again", problem)
    # Without it first: files of two builds that are mixed would have no sums.
    with full_disk_explained(sums):
        sums.unlink(missing_ok=True)
    build()
    write_text(sums, json.dumps({path.name: _sum(path) for path in paths}, indent=1) + "\n")


def _problem(paths: Sequence[Path], sums: Path) -> str | None:
    """Return what is damaged."""
    expected = read_cached_object(sums)
    for path in paths:
        if path.name not in expected:
            return f"{sums} is damaged"
        if _sum(path) != expected[path.name]:
            return f"{path} is damaged"
    return None


def _sum(path: Path) -> dict[str, Any]:
    crc = num_bytes = 0
    with path.open("rb") as stream:
        while piece := stream.read(_PIECE_BYTES):
            crc, num_bytes = zlib.crc32(piece, crc), num_bytes + len(piece)
    return {"bytes": num_bytes, "crc32": f"{crc:08x}"}


def read_cached_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; an empty one if it is missing, unreadable or damaged."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
