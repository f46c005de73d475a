"""A process that has imported everything, and forks the launchers and processes of jobs.

Importing torch and the engine takes seconds, so that a job that starts from nothing spends most of
its short life on it. The code of the jobs is the real one: ``megapoly launch`` for several
processes, :mod:`megapoly.testing.soak.rank` for one.

Requests are lines of JSON on the standard input, answers on the standard output. This process ends
with its input, and the jobs end with this process.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import runpy
import sys
from typing import Any

from megapoly.platform.processes import die_with_parent
from megapoly.testing.soak.forked import fork_ranks, run_and_exit

_LAUNCHER = "megapoly.commands.launch"  # a program here, started by its name


def main() -> None:
    """Answer requests until there are no more."""
    _preload()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what else is printed here goes to the errors
    print(json.dumps("ready"), file=answers, flush=True)
    statuses: dict[int, int | None] = {}
    for line in sys.stdin:
        request = json.loads(line)
        answer: int | None
        if "argv" in request:
            answer = _fork(request)
            statuses[answer] = None
        else:
            answer = _status(request["pid"], statuses)
        print(json.dumps(answer), file=answers, flush=True)


def _preload() -> None:
    import torch

    import megapoly.preflight.local_ranks_preload  # noqa: F401
    import megapoly.testing.soak.rank as rank
    import megapoly.training

    modules = pkgutil.iter_modules(megapoly.training.__path__, "megapoly.training.")
    for name in (_LAUNCHER, *(module.name for module in modules)):
        importlib.import_module(name)
    torch.set_num_threads(1)
    fork_ranks(rank.__name__, rank.main)


def _status(pid: int, statuses: dict[int, int | None]) -> int | None:
    """Return the exit status of a job's first process; minus a signal's number if one killed it."""
    if statuses[pid] is None:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            statuses[pid] = os.waitstatus_to_exitcode(status)
    return statuses[pid]


def _fork(request: dict[str, Any]) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    parent, pid = os.getpid(), os.fork()
    if pid == 0:
        run_and_exit(lambda: _work(request, parent))
    return pid


def _work(request: dict[str, Any], parent: int) -> int:
    from megapoly.testing.soak import rank

    die_with_parent(parent)
    os.setsid()
    null = os.open(os.devnull, os.O_RDONLY)
    log = os.open(request["log"], os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
    for source, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.closerange(3, 256)
    os.environ.update(request["environment"])
    argv: list[str] = request["argv"]
    if request["num_processes"] == 1:
        return rank.main(argv)
    count = ["--nproc-per-node", str(request["num_processes"])]
    sys.argv = ["megapoly", "launch", "--standalone", *count, "-m", rank.__name__, *argv]
    runpy.run_module("megapoly", run_name="__main__", alter_sys=True)  # as `python -m` does
    raise AssertionError("the program has not ended")


if __name__ == "__main__":
    main()
