"""Jobs whose status is looked at from inside, or that end in other ways than completely."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

from processes import wait_until

from megapoly.config.recipes import FOLDER as RECIPES
from megapoly.errors import LockError
from megapoly.pretrain import configure, pretrain
from megapoly.training import hooks, run_lock, step


def refused(argv: list[str]) -> str:
    """Start a job in a folder that another one uses, and return its error."""
    run_lock._PATIENCE_S = 0.0  # in this process alone, which ends with the job
    try:
        _pretrain(argv)
    except LockError as error:
        return str(error)
    return ""


def stopped(argv: list[str], at_step: int) -> None:
    """Run a job that is requested to stop in a step."""
    compute = step.compute_gradients

    def compute_and_signal(state, batches):
        if state.iteration == at_step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return compute(state, batches)

    step.compute_gradients = compute_and_signal
    _pretrain(argv)


def seen_in_evaluation(argv: list[str], run_dir: Path) -> dict:
    """Return what the file says while the job evaluates, at the first evaluation."""
    evaluate, seen = hooks.evaluate_validation_sets, []

    def wait_and_evaluate(state, sets):
        if not seen:
            wait_until(lambda: _read(run_dir).get("state") == "evaluating")
            seen.append(_read(run_dir))
        return evaluate(state, sets)

    hooks.evaluate_validation_sets = wait_and_evaluate
    _pretrain(argv)
    return seen[0]


def _read(run_dir: Path) -> dict:
    try:
        return json.loads((run_dir / "status.json").read_text())
    except FileNotFoundError:
        return {}


def _pretrain(argv: list[str]) -> None:
    pretrain(configure(argv, default_recipe=RECIPES / "dense_tiny.yaml", program="pretrain"))
