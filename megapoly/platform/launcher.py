"""What the launcher says of this process, before there are process groups.

torchrun and ``megapoly launch`` set ``RANK``, ``LOCAL_RANK`` and ``WORLD_SIZE``. Without them the
job is one process.
"""

from __future__ import annotations

import os


def rank() -> int:
    """Number of this process in the job, from 0."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Number of this process on its host, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Number of processes of the job."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_launched() -> bool:
    """Whether a launcher started this process."""
    return "RANK" in os.environ
