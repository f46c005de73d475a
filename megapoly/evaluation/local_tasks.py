"""Task files of the harness that read questions from a folder.

A task file includes the harness's own, which keeps prompt, choices and metrics, and replaces where
the data comes from: one JSON object a line in a file of ``--task-data``, so that nothing is
downloaded. `megapoly export-benchmarks` writes such a folder; its files: docs/how-to/evaluate.md.

Few-shot examples come from the file of the questions itself (the harness leaves out the question
that is asked), but for MMLU, which has a file of examples for each subject.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megapoly.errors import EvaluationError
from megapoly.evaluation.tasks import MMLU_TASKS, EvalTask

PREFIX = "megapoly_"  # keeps our names apart from the harness's
_ARC_FIELDS = ("question", "choices", "answerKey")
_FROZEN_FIELDS = ("question", "choices", "gold")
_FROZEN = {"doc_to_target": "gold", "doc_to_choice": "{{choices}}"}
_MMLU_FIELDS = ("question", "choices", "answer")


@dataclass(frozen=True)
class LocalSet:
    """A benchmark's file of questions.

    Args:
        file: its name in the folder.
        split: of the original that the file holds.
        fields: of each object that are read.
        overrides: entries of the task file, where fields are not those of the original.
    """

    file: str
    split: str
    fields: tuple[str, ...]
    overrides: Mapping[str, str] = field(default_factory=dict)


LOCAL_SETS = {
    "arc_easy": LocalSet("arc_easy__test.jsonl", "test", _FROZEN_FIELDS, _FROZEN),
    "arc_challenge": LocalSet("arc_challenge__test.jsonl", "test", _FROZEN_FIELDS, _FROZEN),
    "arc_easy_validation": LocalSet(
        "ai2_arc__ARC-Easy__validation.jsonl", "validation", _ARC_FIELDS
    ),
    "arc_challenge_validation": LocalSet(
        "ai2_arc__ARC-Challenge__validation.jsonl", "validation", _ARC_FIELDS
    ),
    "hellaswag": LocalSet(
        "hellaswag__none__validation.jsonl",
        "validation",
        ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
    ),
    "piqa": LocalSet(
        "piqa__plain_text__validation.jsonl", "validation", ("goal", "sol1", "sol2", "label")
    ),
    "sciq": LocalSet(
        "sciq__none__validation.jsonl",
        "validation",
        ("support", "question", "distractor1", "distractor2", "distractor3", "correct_answer"),
    ),
    "winogrande": LocalSet(
        "winogrande__winogrande_xl__validation.jsonl",
        "validation",
        ("sentence", "option1", "option2", "answer"),
    ),
    "openbookqa": LocalSet(
        "openbookqa__test.jsonl", "test", _FROZEN_FIELDS, {"doc_to_text": "question", **_FROZEN}
    ),
    "openbookqa_validation": LocalSet(
        "openbookqa__main__validation.jsonl",
        "validation",
        ("question_stem", "choices", "answerKey"),
    ),
    "copa": LocalSet(
        "super_glue__copa__validation.jsonl",
        "validation",
        ("premise", "question", "choice1", "choice2", "label"),
    ),
    # The original's answer is a boolean, SuperGLUE's, which the harness reads, a number `label`.
    "boolq": LocalSet(
        "boolq__none__validation.jsonl",
        "validation",
        ("passage", "question", "answer"),
        {"doc_to_target": "{{answer|int}}"},
    ),
    "commonsense_qa": LocalSet(
        "tau__commonsense_qa__none__validation.jsonl", "validation", _ARC_FIELDS
    ),
    "social_iqa": LocalSet(
        "social_i_qa__none__validation.jsonl",
        "validation",
        ("context", "question", "answerA", "answerB", "answerC", "label"),
    ),
    "coqa": LocalSet(
        "coqa__none__validation.jsonl", "validation", ("story", "questions", "answers")
    ),
}
_HARNESS_FILES = {
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "piqa": "piqa/piqa.yaml",
    "sciq": "sciq/sciq.yaml",
    "winogrande": "winogrande/default.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "copa": "super_glue/copa/default.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "commonsense_qa": "commonsense_qa/default.yaml",
    "social_iqa": "siqa/siqa.yaml",
    "coqa": "coqa/default.yaml",
}


def missing_files(task: EvalTask, task_data: Path) -> list[str]:
    """Return what of a task's data the folder lacks.

    Raises:
        EvaluationError: a line is no object, or lacks a field.
    """
    files: dict[str, tuple[str, ...]]
    if task.name in MMLU_TASKS:
        files = {file: _MMLU_FIELDS for _, file in _mmlu_files()}
    elif task.name in LOCAL_SETS:
        files = {LOCAL_SETS[task.name].file: LOCAL_SETS[task.name].fields}
    else:
        return [f"no form of `{task.name}` for a folder"]
    missing = []
    for file, fields in files.items():
        if (task_data / file).is_file():
            _check_fields(task_data / file, fields)
        else:
            missing.append(file)
    return missing


def all_files() -> list[str]:
    """Return the names of all files that a folder can hold, in the order of the tasks."""
    return [local.file for local in LOCAL_SETS.values()] + [file for _, file in _mmlu_files()]


def write_task_files(tasks: Sequence[EvalTask], folder: Path, task_data: Path | None) -> list[str]:
    """Write the task files of ``tasks`` and return the name of each for the harness.

    Args:
        tasks: those that :data:`megapoly.evaluation.tasks.TASKS` has; the harness's others have
            files of its own, and keep their name.
        folder: where to, for ``TaskManager(include_path=folder)``; absolute paths are written.
        task_data: folder with the questions; None leaves the data where the harness has it.
    """
    names = []
    for task in tasks:
        if task.name in MMLU_TASKS:
            _write_mmlu(task, folder, task_data)
        elif task.name in LOCAL_SETS:
            _write_one(task, folder, task_data)
        else:
            names.append(task.harness_task)
            continue
        names.append(PREFIX + task.name)
    return names


def _write_one(task: EvalTask, folder: Path, task_data: Path | None) -> None:
    content: dict[str, Any] = {
        "include": str(_harness_tasks() / _HARNESS_FILES[task.harness_task]),
        "task": PREFIX + task.name,
        "tag": None,
    }
    if task_data is not None:
        local = LOCAL_SETS[task.name]
        content |= _data_source(folder, {local.split: task_data / local.file})
        # As the "test" split, whatever it is: only of that one does the harness keep the question
        # that is asked out of the examples (0.4.13, lm_eval/api/task.py, fewshot_context).
        content |= {"training_split": None, "validation_split": None}
        content |= {"test_split": local.split, "fewshot_split": local.split, **local.overrides}
    elif task.split == "validation":
        content |= {"test_split": None}  # where there is one, the harness takes it
    _write(folder, content)


def _write_mmlu(task: EvalTask, folder: Path, task_data: Path | None) -> None:
    """Write a file for each subject, and the group whose accuracy is that over all questions."""
    members = []
    for subject, original in _mmlu_subjects(task.name):
        content: dict[str, Any] = {
            "include": str(original),
            "task": f"{PREFIX}{task.name}_{subject}",
            "tag": None,
        }
        if task_data is not None:
            files = {split: task_data / _mmlu_file(subject, split) for split in ("test", "dev")}
            content |= _data_source(folder, files)
        _write(folder, content)
        members.append(content["task"])
    group = {
        "group": PREFIX + task.name,
        "task": members,
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
    }
    (folder / f"{PREFIX}{task.name}.yaml").write_text(yaml.safe_dump(group, sort_keys=False))


def _data_source(folder: Path, files: Mapping[str, Path]) -> dict[str, Any]:
    return {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {split: str(path.resolve()) for split, path in files.items()},
            # Beside the task files, or tables made from files that changed would be left over.
            "cache_dir": str(folder / "cache"),
        },
    }


def _write(folder: Path, content: dict[str, Any]) -> None:
    (folder / f"{content['task']}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))


def _harness_tasks() -> Path:
    import lm_eval.tasks

    return Path(lm_eval.tasks.__file__).parent


def _mmlu_subjects(name: str) -> Iterator[tuple[str, Path]]:
    for path in sorted((_harness_tasks() / MMLU_TASKS[name]).glob("mmlu_*.yaml")):
        yield path.stem.removeprefix("mmlu_"), path


def _mmlu_file(subject: str, split: str) -> str:
    return f"hails__mmlu_no_train__{subject}__{split}.jsonl"


def _mmlu_files() -> Iterator[tuple[str, str]]:
    for subject, _ in _mmlu_subjects("mmlu"):
        for split in ("test", "dev"):
            yield subject, _mmlu_file(subject, split)


def _check_fields(path: Path, fields: Sequence[str]) -> None:
    """Every line: what is wrong with one is otherwise found when all answers are scored."""
    number = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            _check_line(line, f"line {number} of `{path}`", fields)
    if number == 0:
        raise EvaluationError(f"`{path}` has no question")


def _check_line(line: bytes, place: str, fields: Sequence[str]) -> None:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise EvaluationError(
            f"{place} is no JSON object ({error}); the file must have one a line"
        ) from error
    if not isinstance(record, dict):
        raise EvaluationError(f"{place} is no JSON object; the file must have one a line")
    lacking = [name for name in fields if record.get(name) is None]
    if lacking:
        raise EvaluationError(
            f"{place} lacks {', '.join(lacking)}; each must have {', '.join(fields)}"
        )
