"""The paper's benchmarks: split, number of few-shot examples, and metric.

The paper names the thirteen benchmarks and the LM Evaluation Harness (section 4.1), but no
settings. They are therefore assumptions:

- Split. ARC in Table 1 is the test split, in Table 3 the validation split: 56.61 is 1345 of ARC-E's
  2376 test questions and no number of its 570 validation questions, 71.58 is 408 of 570 and no
  number of 2376; 27.47 is 322 of 1172 and 37.12 is 111 of 299 in ARC-C. OpenBookQA, with 500
  questions in either split, follows ARC in Table 3. The others use the harness's split.
- Metric. `acc_norm`, which divides log-likelihoods by the length of the answer, if answers are
  sentences of different lengths (ARC-C, HellaSwag, PIQA, OpenBookQA); `acc` if they are short or
  only the context differs. This is the choice of OLMo's evaluation, whose splits Table 3 uses.
- Few-shot. None, except for MMLU, whose usual five examples come from its `dev` split.
- MMLU is the harness's `mmlu`, whose answers are letters. OLMoE's "MMLU Var", named in the paper's
  Figure 4, scores the texts of the answers; `mmlu_continuation` is closer to that.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from megapoly.errors import EvaluationError

TABLES = ("table1", "table3")
MMLU_TASKS = {"mmlu": "mmlu/default", "mmlu_continuation": "mmlu/continuation"}


@dataclass(frozen=True)
class EvalTask:
    """A benchmark and its settings.

    Args:
        name: name on the command line.
        column: its column in the paper's tables.
        harness_task: its name in the harness.
        metric: metric in tables; None for the first that the harness reports.
        num_fewshot: answered examples before each question; None for the harness's number.
        split: split of the data; None for the harness's choice.
    """

    name: str
    column: str
    harness_task: str
    metric: str | None = None
    num_fewshot: int | None = None
    split: str | None = None


@dataclass(frozen=True)
class Selection:
    """The requested tasks.

    Args:
        names: names that the user gave.
        tables: tables of the paper that were requested as a whole.
        tasks: every task once, in the order of the tables.
    """

    names: tuple[str, ...]
    tables: tuple[str, ...]
    tasks: tuple[EvalTask, ...]


def _task(
    name: str, column: str, metric: str, split: str, *, harness_task: str = "", num_fewshot: int = 0
) -> EvalTask:
    return EvalTask(name, column, harness_task or name, metric, num_fewshot, split)


_ALL = (
    _task("mmlu", "MMLU", "acc", "test", num_fewshot=5),
    _task("mmlu_continuation", "MMLU (continuation)", "acc", "test", num_fewshot=5),
    _task("arc_easy", "ARC-E", "acc", "test"),
    _task("arc_challenge", "ARC-C", "acc_norm", "test"),
    _task("hellaswag", "HellaSwag", "acc_norm", "validation"),
    _task("piqa", "PIQA", "acc_norm", "validation"),
    _task("sciq", "SciQ", "acc", "test"),
    _task("winogrande", "WinoGrande", "acc", "validation"),
    _task("arc_easy_validation", "ARC-E", "acc", "validation", harness_task="arc_easy"),
    _task(
        "arc_challenge_validation", "ARC-C", "acc_norm", "validation", harness_task="arc_challenge"
    ),
    _task("openbookqa", "OBQA", "acc_norm", "test"),
    _task("openbookqa_validation", "OBQA", "acc_norm", "validation", harness_task="openbookqa"),
    _task("copa", "COPA", "acc", "validation"),
    _task("boolq", "BoolQ", "acc", "validation"),
    _task("commonsense_qa", "CSQA", "acc", "validation"),
    _task("social_iqa", "SocialIQA", "acc", "validation"),
    _task("coqa", "CoQA", "f1", "validation"),
)
TASKS = {task.name: task for task in _ALL}

_TABLE1 = ("arc_easy", "arc_challenge", "hellaswag", "piqa", "sciq", "winogrande")
_TABLE3 = (
    "mmlu",
    "hellaswag",
    "sciq",
    "arc_challenge_validation",
    "arc_easy_validation",
    "piqa",
    "winogrande",
    "openbookqa_validation",
    "copa",
)
_NAMED_ONLY = ("boolq", "commonsense_qa", "social_iqa", "coqa")
GROUPS = {
    "table1": _TABLE1,
    "table3": _TABLE3,
    "paper": tuple(dict.fromkeys((*_TABLE1, *_TABLE3, *_NAMED_ONLY))),
}


def select(names: Iterable[str]) -> Selection:
    """Return the tasks of a list of names.

    Args:
        names: groups, tasks, or any task, group or tag of the harness.

    Raises:
        EvaluationError: the list is empty.
    """
    names = tuple(dict.fromkeys(names))
    if not names:
        raise EvaluationError(
            f"`--tasks` is empty; give groups ({', '.join(GROUPS)}) or tasks ({', '.join(TASKS)})"
        )
    members = dict.fromkeys(member for name in names for member in GROUPS.get(name, (name,)))
    tables = TABLES if "paper" in names else tuple(table for table in TABLES if table in names)
    return Selection(
        names, tables, tuple(TASKS.get(name) or EvalTask(name, name, name) for name in members)
    )


def unknown_task(name: str, harness_names: Iterable[str]) -> EvaluationError:
    """Return the error for a name that neither this package nor the harness has."""
    known = {*GROUPS, *TASKS, *harness_names}
    near = difflib.get_close_matches(name, known, n=3)
    hint = f"; the nearest are {', '.join(near)}" if near else ""
    return EvaluationError(
        f"`{name}` is not valid; it must be a task of the LM Evaluation Harness or one of "
        f"{', '.join(GROUPS)}, {', '.join(TASKS)}{hint}"
    )
