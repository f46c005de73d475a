"""torchrun, with the ends of a job reported as this project means them.

    megapoly launch --nproc-per-node 2 -m megapoly train --config moe_tiny

takes torchrun's arguments. A job that was asked to stop (Ctrl-C, SIGTERM) has saved and ends with
status 0, where torchrun shows a stack trace and ends with 1. A failed worker's status is this
program's, without torchrun's report of it: the worker, unless it was killed, has said what was
wrong.

A scheduler that starts stopped jobs again must tell them from complete ones: a job that stopped
before its last step ends with the status that ``MEGAPOLY_STOPPED_STATUS`` says (0 unless set), on
all of its hosts.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import PContext, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from megapoly.platform.launcher import STATUS_FILE, STOPPED

STOPPED_STATUS = "MEGAPOLY_STOPPED_STATUS"

# Seconds that workers have for saving before they are killed (torchrun's own default: 30).
_SHUTDOWN_TIMEOUT = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
_SHUTDOWN_TIMEOUT_S = "600"


def main(argv: Sequence[str] | None = None) -> int:
    """Run torchrun on the arguments; see the module for the status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault(_SHUTDOWN_TIMEOUT, _SHUTDOWN_TIMEOUT_S)
    stopped_status = os.environ.get(STOPPED_STATUS, "0")
    if not (stopped_status.isdecimal() and int(stopped_status) <= 255):
        print(
            f"`{STOPPED_STATUS}` ({stopped_status}) must be an exit status, 0 to 255; 75 is usual "
            "for `start me again`",
            file=sys.stderr,
        )
        return 2
    _let_workers_save(int(os.environ[_SHUTDOWN_TIMEOUT]))
    with tempfile.TemporaryDirectory() as folder:
        status_file = Path(folder) / "status"
        os.environ[STATUS_FILE] = str(status_file)
        status = _run(status_file, arguments)
        stopped = status_file.exists() and status_file.read_text() == STOPPED
        return int(stopped_status) if status == 0 and stopped else status


def _let_workers_save(timeout_s: int) -> None:
    """Torch 2.10, as in docker/Dockerfile, reads no such variable and kills workers after 30 s.

    (pytorch/pytorch#172596; torch 2.13 reads it.) Without a signal of its own `close` ends the
    other workers of one that failed, and keeps its time: they may hang.
    """
    close = PContext.close

    def patient_close(
        self: PContext, death_sig: signal.Signals | None = None, timeout: int = 30
    ) -> None:
        close(self, death_sig, timeout if death_sig is None else timeout_s)

    PContext.close = patient_close  # type: ignore[method-assign]


def _run(status_file: Path, arguments: list[str]) -> int:
    # torchrun leaves a folder for logs behind, which nobody asked for: it goes with this one's.
    usual, tempfile.tempdir = tempfile.tempdir, str(status_file.parent)
    try:
        torchrun(arguments)
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
    finally:
        tempfile.tempdir = usual
    return 0


if __name__ == "__main__":
    sys.exit(main())
