"""torchrun, with the ends of a job reported as this project means them.

    megapoly-launch --nproc-per-node 2 examples/pretrain_moe.sh --config FILE.yaml

takes torchrun's arguments. A job that was asked to stop (Ctrl-C, SIGTERM) has saved and ends with
status 0, where torchrun shows a stack trace and ends with 1. A failed worker's status is this
program's, without torchrun's report of it: the worker, unless it was killed, has said what was
wrong.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from megapoly.pretrain import STATUS_FILE

# Seconds that workers have for saving before they are killed (torchrun's own default: 30).
_SHUTDOWN_TIMEOUT_S = "600"


def main() -> int:
    """Run torchrun on the command line's words; see the module for the status."""
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", _SHUTDOWN_TIMEOUT_S)
    with tempfile.TemporaryDirectory() as folder:
        status_file = Path(folder) / "status"
        os.environ[STATUS_FILE] = str(status_file)
        return _run(status_file)


def _run(status_file: Path) -> int:
    try:
        torchrun(sys.argv[1:])
    except SignalException as error:
        if status_file.exists():
            return 0
        print(f"stopped before the workers had saved and ended: {error}", file=sys.stderr)
        return 1
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            print(f"rank {rank} was killed by {failure.signal_name()}", file=sys.stderr)
            return 128 - failure.exitcode  # as a shell reports it
        return failure.exitcode
    return 0


if __name__ == "__main__":
    sys.exit(main())
