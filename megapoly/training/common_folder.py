"""Check at the start of a job that its hosts share the folder of its checkpoints.

Each rank writes its part of a checkpoint itself. On hosts with a disk of their own under the same
path every part would be saved, and no checkpoint be complete anywhere.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import socket
import tempfile
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from megapoly.checkpoints.run_file import NAME as RUN
from megapoly.checkpoints.run_folder import checkpoints_folder, complete_checkpoints
from megapoly.config import Config
from megapoly.errors import ConfigError
from megapoly.platform import launcher
from megapoly.platform.files import SEEN_WITHIN_S, free_space, refresh_listing
from megapoly.training.rank_zero_first import RankZeroFirst
from megapoly.training.watchdog import heartbeat

logger = logging.getLogger(__name__)

_PREFIX = ".seen_by_all_"
_LIMIT_S = SEEN_WITHIN_S
_NOTE_AFTER_S, _SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 5.0, 0.01, 1.0
_SHOWN = 3


@dataclass(frozen=True)
class _Wanted:
    """What every host must see in its folder of checkpoints.

    Args:
        host: of rank 0.
        file: its name in that folder.
        sha256: of its content.
        is_written_to: ranks are to write there.
    """

    host: str
    file: str
    sha256: str
    is_written_to: bool


def check_common_folder(config: Config, rank_zero_first: RankZeroFirst) -> None:
    """Check that all hosts see the same folder of checkpoints, and can write there; collective.

    Rank 0 writes a file with a random name there, which the first process of every other host
    must find, and deletes it. A run that saves nothing needs no common folder, unless it has a
    checkpoint: then that is what all hosts must find.

    Args:
        config: resolved; ``run_dir`` may have another path on each host. Rank 0 has made it.
        rank_zero_first: entered.

    Raises:
        ConfigError: on rank 0; a host sees another folder, or cannot write there.
        PeerError: on the other ranks, with the same text.
    """
    if launcher.is_on_one_host():
        return
    folder = checkpoints_folder(config.run_dir)
    limit_s = min(_LIMIT_S, 0.5 * rank_zero_first.timeout_s)
    try:
        problems = rank_zero_first.ask_hosts(
            "show all hosts a file of the run",
            partial(_ask, folder, is_written_to=config.checkpoint.save),
            partial(_answer, folder, limit_s=limit_s),
        )
    finally:
        if launcher.rank() == 0:
            _delete_files(folder)
    if problems:
        raise ConfigError([_refusal(config, problems)])


def _ask(folder: Path, *, is_written_to: bool) -> str:
    """Return what other hosts must see, for :func:`_answer`; nothing if that does not matter."""
    if is_written_to:
        _delete_files(folder)  # of a job that was killed meanwhile
        file, content = f"{_PREFIX}{uuid.uuid4().hex}", uuid.uuid4().hex
        _write(folder / file, content)
    elif complete := complete_checkpoints(folder.parent):
        file = f"{complete[-1].name}/{RUN}"
        content = (folder / file).read_text()
    else:
        return ""
    sha256 = hashlib.sha256(content.encode()).hexdigest()
    return json.dumps(asdict(_Wanted(socket.gethostname(), file, sha256, is_written_to)))


def _write(path: Path, content: str) -> None:
    """Write a file; no host knows its name before it is complete."""
    try:
        with path.open("x") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        problem = (
            f"`run_dir` cannot be written: {path.parent}: {error.strerror}; "
            f"{free_space(path)}; make room or choose another folder"
        )
        raise ConfigError([problem]) from error


def _answer(folder: Path, question: str, *, limit_s: float) -> str:
    """Return what is wrong on this host; nothing if it sees the file and can write there."""
    if not question:
        return ""
    wanted = _Wanted(**json.loads(question))
    why = _wait_until_right(lambda: _why_unseen(folder, wanted), limit_s, folder, wanted.host)
    if not why and wanted.is_written_to:
        why = _why_not_written(folder)
    return why and f"rank {launcher.rank()} on {socket.gethostname()} {why}"


def _wait_until_right(
    find_problem: Callable[[], str], limit_s: float, folder: Path, host: str
) -> str:
    """Return the problem that is left after a while, or nothing as soon as there is none."""
    begin, pause, is_noted = time.monotonic(), _SHORTEST_PAUSE_S, False
    while why := find_problem():
        waited = time.monotonic() - begin
        if waited > limit_s:
            return f"{why}, after {limit_s:g} s"
        if waited > _NOTE_AFTER_S and not is_noted:
            is_noted = True
            logger.warning(
                "rank %d on %s waits to see what rank 0 on %s has written in %s: %.0f s so far, at "
                "most %.0f s",
                launcher.rank(),
                socket.gethostname(),
                host,
                folder,
                waited,
                limit_s,
            )
        heartbeat.beat()
        time.sleep(pause)
        pause = min(_LONGEST_PAUSE_S, 1.5 * pause)
    return ""


def _why_unseen(folder: Path, wanted: _Wanted) -> str:
    """Return why a file is not what rank 0 wrote, to follow the name of the host."""
    path = folder / wanted.file
    try:
        content = path.read_bytes()
    except OSError as error:
        refresh_listing(folder)
        if folder.is_dir():
            return f"does not see {path}, which rank 0 on {wanted.host} sees ({error.strerror})"
        return f"has no folder {folder} that it can read ({error.strerror})"
    if hashlib.sha256(content).hexdigest() != wanted.sha256:
        return f"sees another {path} than rank 0 on {wanted.host}"
    return ""


def _why_not_written(folder: Path) -> str:
    """Return why this host cannot write in the folder, to follow the name of the host."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=_PREFIX) as file:
            file.write(b"1")
            file.flush()
            os.fsync(file.fileno())  # a quota may be checked no earlier
    except OSError as error:
        return f"cannot write in {folder} ({error.strerror})"
    return ""


def _delete_files(folder: Path) -> None:
    with suppress(OSError):
        for path in folder.glob(f"{_PREFIX}*"):
            path.unlink(missing_ok=True)


def _refusal(config: Config, problems: list[str]) -> str:
    more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    need = "see and can write to" if config.checkpoint.save else "see, since it has checkpoints"
    without = "" if config.checkpoint.save else ", or choose another `run_dir`"
    return (
        f"`run_dir` ({config.run_dir}) must be one folder that all hosts of the job {need}: "
        f"{'; '.join(problems[:_SHOWN])}{more}. Give a folder of a file system that all hosts "
        "mount (`--run_dir FOLDER`; in containers `docker/launch.sh --runs FOLDER`), writable for "
        f"the user of the job on each{without}"
    )
