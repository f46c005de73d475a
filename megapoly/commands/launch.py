"""Run torchrun, with exit statuses that a script or a scheduler can use.

    megapoly launch --nproc-per-node 2 -m megapoly train --config moe_tiny

The arguments are torchrun's. A job that was requested to stop (Ctrl-C, SIGTERM) has saved and ends
with status 0, where torchrun prints a stack trace and ends with 1. When a worker fails, its status
is this command's, without torchrun's report of it: unless it was killed, the worker has printed
what was wrong.

A scheduler that starts stopped jobs again must distinguish them from complete ones: a job that
stopped before its last step ends with the status in the environment variable
MEGAPOLY_STOPPED_STATUS (0 if not set), on all of its hosts.

Status 4 (a rank stopped advancing), 5 (another host or process was lost) and those above 128 (a
worker was killed by a signal) mean that the job resumes if it is started again. Where the
environment variable MEGAPOLY_RESTART_STATUS is set, they all have its value. The third start in a
row from the same checkpoint that ends so without having saved another has status 1.

The processes and hosts of a job wait for each other for the seconds in the environment variable
MEGAPOLY_JOIN_TIMEOUT_S (600 if not set). When they do not meet, or an option cannot be used, the
status is 2 and a sentence says why.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from subprocess import Popen
from typing import Any, cast

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.api import PContext, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.run import get_args_parser
from torch.distributed.run import main as torchrun

from megapoly.commands import ends_with_its_reader
from megapoly.errors import MegapolyError
from megapoly.platform import launcher
from megapoly.platform.launcher import HUNG, JOIN_TIMEOUT, STATUS_FILE, STATUS_HUNG, STOPPED
from megapoly.platform.output import train_on_without_output
from megapoly.platform.processes import (
    STOP_SIGNALS,
    dying_with_this_process,
    ignore_stop_signals,
    outlives_its_terminal,
)
from megapoly.preflight.host_meeting import WaitingNotes
from megapoly.preflight.hosts import added_options, check_options, num_hosts, wait_for_hosts

STOPPED_STATUS = "MEGAPOLY_STOPPED_STATUS"

# Seconds that workers have for saving before they are killed (torchrun's own default: 30).
_SHUTDOWN_TIMEOUT = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
_SHUTDOWN_TIMEOUT_S = "600"


@ends_with_its_reader
def main(argv: Sequence[str] | None = None) -> int:
    """Run torchrun on the arguments; see the module for the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = _parse(arguments)
    train_on_without_output()
    stopped_status = os.environ.get(STOPPED_STATUS, "0")
    if not (stopped_status.isdecimal() and int(stopped_status) <= 255):
        print(
            f"`{STOPPED_STATUS}` ({stopped_status}) must be an exit status, 0 to 255; 75 usually "
            "means `start again`",
            file=sys.stderr,
        )
        return 2
    try:
        launcher.restart_status(launcher.LOST_PEER)  # before a wait for other hosts, too
        check_options(options)
        arguments = [*added_options(options), *arguments]
        store = wait_for_hosts(options)  # torchrun finds it by its port
    except MegapolyError as error:
        print(f"megapoly launch: {error}", file=sys.stderr)
        return 2
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault(_SHUTDOWN_TIMEOUT, _SHUTDOWN_TIMEOUT_S)
    _let_workers_save(int(os.environ[_SHUTDOWN_TIMEOUT]))
    notes = None
    if store is None and num_hosts(options) > 1:
        what = f"{options.nnodes} hosts at {options.rdzv_endpoint}"
        notes = WaitingNotes(what, launcher.join_timeout_s())
    subprocess_handler.Popen = _starting_workers(notes)  # type: ignore[assignment,misc]
    with tempfile.TemporaryDirectory() as folder:
        status_file = Path(folder) / "status"
        os.environ[STATUS_FILE] = str(status_file)
        launcher.reserve_status(status_file)
        status = _run(status_file, arguments)
        if launcher.means_restart(status):
            return _restart(status, status_file)
        return int(stopped_status) if status == 0 and _says(status_file, STOPPED) else status


def build_parser() -> ArgumentParser:
    """Return torchrun's parser with the description of this command."""
    parser: ArgumentParser = get_args_parser()
    parser.prog, parser.description = "megapoly launch", __doc__
    parser.usage = "%(prog)s [options of torchrun] (SCRIPT | -m MODULE) [arguments]"
    parser.formatter_class = RawDescriptionHelpFormatter
    return parser


def _parse(arguments: list[str]) -> Namespace:
    """Parse the options; end the program at ``--help`` and at an unknown one; name the nearest."""
    parser = build_parser()
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        flag = unknown[0].partition("=")[0]
        (nearest,) = get_close_matches(flag, parser._option_string_actions, n=1, cutoff=0.0)
        parser.error(f"unknown option {flag} (the nearest is {nearest})")
    return options


def _let_workers_save(timeout_s: int) -> None:
    """Let workers save for ``timeout_s`` seconds before they are killed.

    Torch 2.10, as in docker/Dockerfile, does not read the variable and kills them after 30 s
    (pytorch/pytorch#172596; torch 2.13 reads it). Without a signal `close` ends the other workers
    of one that failed; its time stays, because they may hang.
    """
    close = PContext.close

    def patient_close(
        self: PContext, death_sig: signal.Signals | None = None, timeout: int = 30
    ) -> None:
        close(self, death_sig, timeout if death_sig is None else timeout_s)

    PContext.close = patient_close  # type: ignore[method-assign]


def _restart(status: int, status_file: Path) -> int:
    """Return the status that has the job started again, or 1 where that would not help."""
    is_request = status - 128 in STOP_SIGNALS  # before the first step: nothing has failed
    if not is_request and (reason := launcher.told_start(status_file)):
        print(f"megapoly launch: {reason}", file=sys.stderr)
        return 1
    return launcher.restart_status(status)


def _starting_workers(notes: WaitingNotes | None) -> Callable[..., Any]:
    """Return what torchrun is to start a worker with; the worker ends with this process."""
    end_with_this, start_process = dying_with_this_process(), cast("Any", Popen)
    has_nohup = outlives_its_terminal()

    def start(*args: Any, **kwargs: Any) -> Popen[Any]:
        if notes is not None:
            notes.end()
        if has_nohup:  # torchrun has just given it a handler (pytorch/pytorch#67538)
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        return start_process(*args, preexec_fn=end_with_this, **kwargs)

    return start


def _run(status_file: Path, arguments: list[str]) -> int:
    # torchrun leaves a folder for logs behind: it is deleted with the folder of the status file.
    usual, tempfile.tempdir = tempfile.tempdir, str(status_file.parent)
    try:
        torchrun(arguments)
        ignore_stop_signals()  # torchrun's handlers, which raise an error, stay installed
    except SignalException as error:
        if status_file.exists():
            return HUNG if _says(status_file, STATUS_HUNG) else 0
        print(f"stopped before the workers had saved and ended: {error}", file=sys.stderr)
        return 128 + int(error.sigval)
    except ChildFailedError as error:
        if _says(status_file, STATUS_HUNG):
            return HUNG
        rank, failure = _cause(error)
        if failure.exitcode < 0:
            print(f"rank {rank} was killed by {failure.signal_name()}", file=sys.stderr)
            return 128 - failure.exitcode  # as a shell reports it
        return failure.exitcode
    except (dist.DistError, RendezvousError) as error:
        reason = str(error).strip().splitlines() or ["not all joined in time"]
        if launcher.told_start(status_file) is not None:
            print(f"megapoly launch: lost the other hosts of the job: {reason[0]}", file=sys.stderr)
            return launcher.LOST_PEER
        print(
            f"megapoly launch: the hosts of the job did not meet: {reason[0]}. Start it on each "
            f"of `--nnodes` with the same address and port; {JOIN_TIMEOUT} is the limit of waiting",
            file=sys.stderr,
        )
        return 2
    finally:
        tempfile.tempdir = usual
        ignore_stop_signals()
    return 0


def _cause(error: ChildFailedError) -> tuple[int, ProcessFailure]:
    """Return the rank that failed first, and how.

    Torchrun lists all that ended after it, too: those that lost it, and those that torchrun itself
    ended, by SIGTERM and after 30 seconds by SIGKILL.
    """
    first_s = min(failure.timestamp for failure in error.failures.values())

    def order(item: tuple[int, ProcessFailure]) -> tuple[int, int]:
        exitcode, timestamp = item[1].exitcode, item[1].timestamp
        late_kill = exitcode == -signal.SIGKILL and timestamp - first_s >= 20
        ended = exitcode == -signal.SIGTERM or late_kill
        return (2 if ended else 1 if exitcode == launcher.LOST_PEER else 0), timestamp

    return min(error.failures.items(), key=order)


def _says(status_file: Path, text: str) -> bool:
    return launcher.told_status(status_file) == text


if __name__ == "__main__":
    sys.exit(main())
