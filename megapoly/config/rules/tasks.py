"""Rules on benchmark tasks that are evaluated during training."""

from __future__ import annotations

from collections.abc import Iterator

from megapoly.config.options import short
from megapoly.config.rules.facts import Facts, Rule, have_no_effect
from megapoly.platform.files import is_folder

TASKS = "`training.eval_tasks`"
INTERVAL = "`training.eval_tasks_interval`"


def tasks_have_an_interval(facts: Facts) -> Iterator[str]:
    """Tasks need an interval, and an interval needs tasks."""
    training = facts.config.training
    tasks, interval = training.eval_tasks, training.eval_tasks_interval
    if tasks is None:
        if interval > 0:
            yield f"{INTERVAL} ({interval}) needs {TASKS} (null); name tasks, or set it to 0"
    elif not tasks:
        yield f"{TASKS} ([]) names no task; name one, such as [arc_easy], or leave it null"
    elif interval == 0:
        yield (
            f"{TASKS} ({', '.join(tasks)}) needs {INTERVAL} (0); set it to the steps between "
            "evaluations, or leave the tasks null"
        )


def task_options_have_effect(facts: Facts) -> Iterator[str]:
    """Options of tasks need tasks."""
    keys = ["training.eval_tasks_limit", "training.eval_tasks_data"]
    if facts.config.training.eval_tasks is None:
        yield from have_no_effect(facts.config, keys, f"with {TASKS} (null)", ", or name tasks")


def task_data_exists(facts: Facts) -> Iterator[str]:
    """The folder of the tasks' questions exists."""
    folder = facts.config.training.eval_tasks_data
    if folder is not None and not is_folder(folder):
        yield (
            f"`training.eval_tasks_data` ({short(folder)}) is not a folder; give one that holds "
            "the tasks' questions, or leave it null for the harness to find them"
        )


def harness_is_installed(facts: Facts) -> Iterator[str]:
    """Tasks need LM Evaluation Harness."""
    tasks = facts.config.training.eval_tasks
    if tasks and not facts.lm_eval_available:
        yield (
            f"{TASKS} ({', '.join(tasks)}) needs LM Evaluation Harness, which is not installed; "
            "`pip install 'megapoly[eval]'`, or leave it null"
        )


RULES: tuple[Rule, ...] = (
    tasks_have_an_interval,
    task_options_have_effect,
    task_data_exists,
    harness_is_installed,
)
