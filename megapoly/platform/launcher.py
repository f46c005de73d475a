"""Environment variables, files and exit statuses between launcher and process.

torchrun and ``megapoly launch`` set ``RANK``, ``LOCAL_RANK`` and ``WORLD_SIZE``. Without them the
job is one process.
"""

from __future__ import annotations

import os

# Exit status of a run whose loss was not finite: its configuration is valid, and starting it again
# changes nothing.
DIVERGED = 3
# Environment variable with the path of a file. The first process of a host writes it when it ends
# without an error: COMPLETE, or STOPPED before the run's last step. Each host has a launcher that
# reads it.
STATUS_FILE = "MEGAPOLY_STATUS_FILE"
COMPLETE, STOPPED = "complete", "stopped"


def rank() -> int:
    """Return the number of this process in the job, from 0."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Return the number of this process on its host, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Return the number of processes of the job."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_launched() -> bool:
    """Return whether a launcher started this process."""
    return "RANK" in os.environ
