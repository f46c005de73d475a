"""A job that is requested to stop while it evaluates tasks."""

import os
import signal
from pathlib import Path

from megapoly.pretrain import configure, pretrain


def job_stopped_in_tasks(argv: list[str], recipe: str) -> None:
    from megapoly.evaluation.engine_lm import EngineLM

    run, num_calls = EngineLM._run, 0

    def run_and_signal(self, *args):
        nonlocal num_calls
        num_calls += 1
        # One rank of several; the first calls are those of the check before the first step.
        if num_calls > 4 and os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGTERM)
        return run(self, *args)

    EngineLM._run = run_and_signal
    pretrain(configure(argv, default_recipe=Path(recipe), program="pretrain"))
