"""One job at a time in a run's folder, by the lock ``RUN_DIR/.lock``, which names its holder.

Where the file system has no locks, or its locks hold on one host only, a second job is not refused.
It signs the file in its turn, and the first job finds the other signature before it next writes a
checkpoint: it ends, and the checkpoints are those of the second.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from megapoly.errors import LockError
from megapoly.platform import launcher
from megapoly.platform.locks import at_most, is_locked, locked

logger = logging.getLogger(__name__)

_FILE = ".lock"
# A job that was killed holds the lock until the system has freed its memory.
_PATIENCE_S = 5.0
_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_RULE = "One job at a time trains in a `run_dir`"
_signed: dict[Path, str] = {}  # by this process: the folders that it holds, and the jobs' names


@dataclass(frozen=True)
class Holder:
    """The job that holds the lock of a folder, or was the last to.

    Args:
        host: name of rank 0's host.
        pid: process of rank 0.
        started: seconds since 1970, by that host's clock.
        job: random name of this start.
        slurm_job: id that ``scancel`` takes, ``1234`` or ``1234_7`` of an array; None: not Slurm's.
        pod: name of the Kubernetes pod; None: in none.
        namespace: of the pod; None: not known.
        jobset: name of the JobSet that has the pod; None: not known.
    """

    host: str
    pid: int
    started: float
    job: str = ""
    slurm_job: str | None = None
    pod: str | None = None
    namespace: str | None = None
    jobset: str | None = None

    def __str__(self) -> str:
        """Return who it is, as a part of a sentence."""
        age = datetime.timedelta(seconds=max(0, round(time.time() - self.started)))
        manager = ""
        if self.slurm_job is not None:
            manager = f"Slurm job {self.slurm_job}, "
        elif self.pod is not None:
            manager = f"pod {self.pod}, "
        return f"a job on {self.host}, process {self.pid}, {manager}started {age} ago"

    @property
    def command(self) -> str:
        """How to end it, as a part of a sentence."""
        if self.slurm_job is not None:
            return f"`scancel --batch --signal TERM {self.slurm_job}`: it saves first"
        if self.pod is not None:
            where = "" if self.namespace is None else f"-n {self.namespace} "
            if self.jobset is not None:
                return f"`kubectl {where}delete jobset {self.jobset}`"
            return f"delete what `kubectl {where}describe pod {self.pod}` says controls it"
        return f"`kill {self.pid}` on {self.host}: it saves first"


@contextmanager
def sole_job(run_dir: Path) -> Iterator[None]:
    """Hold the lock of a run's folder, which exists, and sign it.

    The system releases the lock when the process and those that it has forked have ended, however
    they end; the file stays. On a file system that has no locks, a warning is logged and the folder
    is used without; see :func:`check_sole`.

    Raises:
        LockError: another job holds the lock, on any host that shares the file system.
    """

    def refusal(file: IO[str]) -> LockError:
        holder = _read(run_dir)
        who = "another job" if holder is None else holder
        command = "" if holder is None else f" ({holder.command})"
        return LockError(
            f"{_RULE}: {who}, uses {run_dir} and holds its lock; wait until it ends, or stop it"
            f"{command}, or choose another `run_dir`."
        )

    folder = run_dir.absolute()
    with locked(run_dir / _FILE, at_most(_PATIENCE_S, refusal)) as lock:
        if lock.missing:
            _warn(run_dir, lock.missing)
        holder = _this_job()
        if _sign(lock.file, holder):
            _signed[folder] = holder.job
        try:
            yield
        finally:
            _signed.pop(folder, None)


def is_held(run_dir: Path) -> bool | None:
    """Return whether a job of this host holds the lock; None if that cannot be told from here.

    The lock is taken for a moment; a job that starts just then tries again.
    """
    holder = _read(run_dir)
    if holder is None or holder.host != socket.gethostname():
        return None  # nobody has signed it; or a file system may have locks of each host
    return is_locked(run_dir / _FILE)


def check_sole(run_dir: Path) -> None:
    """Check that no other job has signed a folder since this process did.

    A process that has not signed it, or cannot read who has, is not stopped.

    Raises:
        LockError: another job has; this one is to write nothing more there.
    """
    own, holder = _signed.get(run_dir.absolute()), _read(run_dir)
    if own is None or holder is None or holder.job in ("", own):
        return
    raise LockError(
        f"{_RULE}: {holder}, has begun in {run_dir} after this one, and the locks of its file "
        "system did not prevent it; this job ends and saves nothing more there. The other one "
        f"resumed from the newest checkpoint: let it train, or stop it ({holder.command}) and "
        "start this one again, and start one job at a time."
    )


def _warn(run_dir: Path, reason: str) -> None:
    holder = _read(run_dir)
    last = "" if holder is None else f"; the last one there was {holder}"
    logger.warning(
        "the file system of %s has no locks (%s): a second job in this folder is not refused, and "
        "the first one ends at its next checkpoint, so start none before this one has ended%s",
        run_dir,
        reason,
        last,
    )


def _this_job() -> Holder:
    pod, namespace = launcher.kubernetes_pod(), None
    if pod is not None:
        with suppress(OSError):
            namespace = _NAMESPACE.read_text().strip() or None
    return Holder(
        host=socket.gethostname(),
        pid=os.getpid(),
        started=time.time(),
        job=uuid.uuid4().hex,
        slurm_job=launcher.slurm_job(),
        pod=pod,
        namespace=namespace,
        jobset=os.environ.get("JOBSET_NAME"),
    )


def _sign(file: IO[str], holder: Holder) -> bool:
    """Write who holds the lock; return False where a full disk takes no name."""
    known = {name: value for name, value in asdict(holder).items() if value is not None}
    with suppress(OSError):
        file.truncate(0)
        file.write(json.dumps(known) + "\n")
        file.flush()
        os.fsync(file.fileno())
        return True
    return False


def _read(run_dir: Path) -> Holder | None:
    """Return who signed a folder last; None if that cannot be read."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads((run_dir / _FILE).read_text())
        optional = {
            name: str(found[name])
            for name in ("job", "slurm_job", "pod", "namespace", "jobset")
            if name in found
        }
        return Holder(str(found["host"]), int(found["pid"]), float(found["started"]), **optional)
    return None
