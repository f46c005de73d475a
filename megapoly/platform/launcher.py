"""Environment variables, files and exit statuses between launcher and process.

torchrun and ``megapoly launch`` set ``RANK``, ``LOCAL_RANK`` and ``WORLD_SIZE``. Without RANK the
job is one process, whatever the others say: clusters set them for other purposes, too.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path

from megapoly.errors import (
    DivergenceError,
    LaunchError,
    LostPeerError,
    MegapolyError,
    PeerError,
)

# Exit status of a run whose loss was not finite, or had more spikes than `training.spike_action`
# allows: its configuration is valid, and starting it again changes nothing.
DIVERGED = 3
# Exit status of a run that a rank has stopped advancing; `RUN_DIR/diagnostics` says where.
HUNG = 4
# Exit status of a process that lost another one of its job: killed, or cut off together with its
# host. Started again, the run resumes.
LOST_PEER = 5
# Environment variable with the status of every end after which the job should be started again,
# instead of HUNG, LOST_PEER and that of a killed process: Kubernetes wants one of at least 128.
RESTART_STATUS = "MEGAPOLY_RESTART_STATUS"

# Environment variable with the path of a file. The first process of a host writes it when it ends
# without an error: COMPLETE, or STOPPED before the run's last step. When a run hangs, a watcher of
# the host writes STATUS_HUNG. Each host has a launcher that reads it.
STATUS_FILE = "MEGAPOLY_STATUS_FILE"
COMPLETE, STOPPED, STATUS_HUNG = "complete", "stopped", "hung"
# Beside it, a file that exists once the processes of the job have met. While starting the job again
# would not help, it has the reason.
_START_FILE = "start"
# Beside it, blocks of the disk for the first one: /tmp may be full when the job ends.
_ROOM_FILE, _ROOM_BYTES = "room", 16

# Environment variable with the seconds that a process or host waits for the others of its job.
JOIN_TIMEOUT = "MEGAPOLY_JOIN_TIMEOUT_S"
_JOIN_TIMEOUT_S = "600"


def rank() -> int:
    """Return the number of this process in the job, from 0."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Return the number of this process on its host, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0")) if is_launched() else 0


def world_size() -> int:
    """Return the number of processes of the job."""
    return int(os.environ.get("WORLD_SIZE", "1")) if is_launched() else 1


def is_on_one_host() -> bool:
    """Return whether a launcher says that it started all processes of the job."""
    return os.environ.get("LOCAL_WORLD_SIZE") == str(world_size()) or not is_launched()


def join_timeout_s() -> float:
    """Return how long a process or host waits for the others of its job.

    Raises:
        LaunchError: the environment variable has no such number.
    """
    text = os.environ.get(JOIN_TIMEOUT, _JOIN_TIMEOUT_S)
    if not (text.isdecimal() and len(text) <= 6 and int(text) >= 1):
        raise LaunchError(
            f"`{JOIN_TIMEOUT}` ({text[:80]}) must be a whole number of seconds, 1 to 999999; "
            f"without it the limit is {_JOIN_TIMEOUT_S}"
        )
    return float(text)


def exit_status(error: BaseException) -> int:
    """Return the exit status of a process that an error ends; docs/how-to/on_call.md lists them."""
    if isinstance(error, PeerError) and error.exit_status is not None:
        return error.exit_status
    if isinstance(error, LostPeerError):
        return LOST_PEER
    if isinstance(error, DivergenceError):
        return DIVERGED
    return 2 if isinstance(error, MegapolyError) else 1


def means_restart(status: int) -> bool:
    """Return whether a job that ended with this status resumes if it is started again.

    Statuses above 128 are those of killed processes, as a shell has them.
    """
    return status in (HUNG, LOST_PEER) or status > 128


def restart_status(status: int) -> int:
    """Return the status to end with where ``status`` means that the job is to be started again.

    Raises:
        LaunchError: ``MEGAPOLY_RESTART_STATUS`` is no exit status.
    """
    text = os.environ.get(RESTART_STATUS, str(status))
    if not (_is_number(text) and 1 <= int(text) <= 255):
        raise LaunchError(
            f"`{RESTART_STATUS}` ({text[:80]}) must be an exit status, 1 to 255, for `start this "
            "job again`"
        )
    return int(text)


def reserve_status(status_file: Path) -> None:
    """Reserve room on the disk for what a process is to tell at the end of the job.

    Args:
        status_file: that the launcher names in ``MEGAPOLY_STATUS_FILE``.
    """
    with contextlib.suppress(OSError):
        status_file.with_name(_ROOM_FILE).write_text(" " * _ROOM_BYTES)


def tell_status(text: str) -> None:
    """Tell the launcher of this host, if there is one, how the run has ended.

    Args:
        text: COMPLETE or STOPPED.
    """
    if STATUS_FILE not in os.environ:
        return
    status_file = Path(os.environ[STATUS_FILE])
    room = status_file.with_name(_ROOM_FILE)
    if not room.exists():
        status_file.write_text(text)
        return
    with room.open("r+") as file:  # in place, which takes no block
        file.write(text.ljust(_ROOM_BYTES))
    room.replace(status_file)


def told_status(status_file: Path) -> str | None:
    """Return what :func:`tell_status` or a watcher has told; None if nothing.

    Args:
        status_file: that the launcher has named in ``MEGAPOLY_STATUS_FILE``.
    """
    return status_file.read_text().strip() if status_file.exists() else None


def tell_start(reason: str = "") -> None:
    """Tell the launcher of this host, if there is one, that the processes of the job have met.

    Args:
        reason: why starting the job again would not help, a sentence; empty: it would.
    """
    if STATUS_FILE in os.environ:
        with contextlib.suppress(OSError):  # a full /tmp, which is to end no run
            Path(os.environ[STATUS_FILE]).with_name(_START_FILE).write_text(reason)


def told_start(status_file: Path) -> str | None:
    """Return the reason that :func:`tell_start` was given on this host; None if it was not called.

    Args:
        status_file: that the launcher has named in ``MEGAPOLY_STATUS_FILE``.
    """
    file = status_file.with_name(_START_FILE)
    return file.read_text() if file.exists() else None


def scheduler_job() -> str | None:
    """Return what the scheduler calls this job, or None without one that is known.

    That of Slurm is the job's or the array task's number, which stays when the job is requeued. A
    JobSet keeps its UID when it starts its pods again, and its name also when it is made anew.
    """
    return slurm_job() or os.environ.get("JOBSET_UID") or os.environ.get("JOBSET_NAME")


def kubernetes_pod(environ: Mapping[str, str] = os.environ) -> str | None:
    """Return the name of the Kubernetes pod that this process is in, or None in none.

    The host's name is the pod's, unless the pod sets another one, as those of a JobSet do, and
    gives its own in POD_NAME.
    """
    if "KUBERNETES_SERVICE_HOST" not in environ:
        return None
    return environ.get("POD_NAME") or socket.gethostname()


def slurm_job() -> str | None:
    """Return the number of this Slurm job, as ``scancel`` takes it: ``1234``, or ``1234_7``.

    Outside Slurm it is None.
    """
    array, task = (os.environ.get(f"SLURM_ARRAY_{part}_ID") for part in ("JOB", "TASK"))
    if array and task:
        return f"{array}_{task}"
    return os.environ.get("SLURM_JOB_ID") or None


def check(*, with_address: bool) -> None:
    """Check the variables that a launcher sets for this process.

    Args:
        with_address: also MASTER_ADDR and MASTER_PORT, which a process needs to join its job.

    Raises:
        LaunchError: one is missing, or is no number in its range; also
            ``MEGAPOLY_RESTART_STATUS``, whoever sets it.
    """
    restart_status(LOST_PEER)
    if not is_launched():
        return
    problems = list(_problems_of_numbers())
    if with_address:
        problems += _problems_of_address()
    if problems:
        raise LaunchError(
            f"{'; '.join(problems)}. RANK ({os.environ['RANK'][:80]}) says that a launcher started "
            "this process: start it with `megapoly launch` or torchrun, or unset RANK to run alone"
        )


def _problems_of_numbers() -> Iterator[str]:
    texts = {name: os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK")}
    texts["WORLD_SIZE"] = os.environ.get("WORLD_SIZE", "1")
    wrong = [f"`{name}` ({text[:80]}) is not a whole number" for name, text in texts.items()
             if not _is_number(text)]  # fmt: skip
    yield from wrong
    if not wrong and not 0 <= rank() < world_size():
        yield f"`RANK` ({rank()}) is not below `WORLD_SIZE` ({world_size()})"


def _problems_of_address() -> Iterator[str]:
    if not os.environ.get("MASTER_ADDR"):
        yield "`MASTER_ADDR`, the host of rank 0, is not set"
    port = os.environ.get("MASTER_PORT", "")
    if not port:
        yield "`MASTER_PORT`, a port of that host, is not set"
    elif not (_is_number(port) and 0 < int(port) < 65536):
        yield f"`MASTER_PORT` ({port[:80]}) is not a port, 1 to 65535"


def _is_number(text: str) -> bool:
    return text.isdecimal() and text.isascii() and len(text) < 10


def is_launched() -> bool:
    """Return whether a launcher started this process."""
    return "RANK" in os.environ


def is_torchrun() -> bool:
    """Return whether this process is a rank whose parent is torchrun or ``megapoly launch``."""
    return is_launched() and "TORCHELASTIC_RUN_ID" in os.environ
