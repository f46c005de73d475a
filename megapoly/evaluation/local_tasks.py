"""Task files for the harness that read questions from a folder.

A task file includes the harness's own, with its prompt, choices and metrics, and replaces only the
source of the data: a file in ``--task-data`` with one JSON object per line. Nothing is downloaded.
``megapoly export-benchmarks`` writes such a folder; docs/how-to/evaluate.md lists its files.

Few-shot examples come from the file of questions itself (the harness leaves out the current
question), except for MMLU, which has a file of examples for each subject.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megapoly.data.token_files import sha256_of
from megapoly.errors import EvaluationError
from megapoly.evaluation.tasks import MMLU_TASKS, EvalTask

PREFIX = "megapoly_"  # distinguishes our names from the harness's
_ARC_FIELDS = ("question", "choices", "answerKey")
_FROZEN_FIELDS = ("question", "choices", "gold")
_FROZEN = {"doc_to_target": "gold", "doc_to_choice": "{{choices}}"}
_MMLU_FIELDS = ("question", "choices", "answer")


@dataclass(frozen=True)
class QuestionFile:
    """A benchmark's file of questions.

    Args:
        file: its name in the folder.
        split: split of the original that the file holds.
        fields: required fields of each object.
        overrides: entries of the task file, if fields differ from the original's.
    """

    file: str
    split: str
    fields: tuple[str, ...]
    overrides: Mapping[str, str] = field(default_factory=dict)


QUESTION_FILES = {
    "arc_easy": QuestionFile("arc_easy__test.jsonl", "test", _FROZEN_FIELDS, _FROZEN),
    "arc_challenge": QuestionFile("arc_challenge__test.jsonl", "test", _FROZEN_FIELDS, _FROZEN),
    "arc_easy_validation": QuestionFile(
        "ai2_arc__ARC-Easy__validation.jsonl", "validation", _ARC_FIELDS
    ),
    "arc_challenge_validation": QuestionFile(
        "ai2_arc__ARC-Challenge__validation.jsonl", "validation", _ARC_FIELDS
    ),
    "hellaswag": QuestionFile(
        "hellaswag__none__validation.jsonl",
        "validation",
        ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
    ),
    "piqa": QuestionFile(
        "piqa__plain_text__validation.jsonl", "validation", ("goal", "sol1", "sol2", "label")
    ),
    "sciq": QuestionFile(
        "sciq__none__validation.jsonl",
        "validation",
        ("support", "question", "distractor1", "distractor2", "distractor3", "correct_answer"),
    ),
    "winogrande": QuestionFile(
        "winogrande__winogrande_xl__validation.jsonl",
        "validation",
        ("sentence", "option1", "option2", "answer"),
    ),
    "openbookqa": QuestionFile(
        "openbookqa__test.jsonl", "test", _FROZEN_FIELDS, {"doc_to_text": "question", **_FROZEN}
    ),
    "openbookqa_validation": QuestionFile(
        "openbookqa__main__validation.jsonl",
        "validation",
        ("question_stem", "choices", "answerKey"),
    ),
    "copa": QuestionFile(
        "super_glue__copa__validation.jsonl",
        "validation",
        ("premise", "question", "choice1", "choice2", "label"),
    ),
    # The original has a boolean `answer`; the harness expects SuperGLUE's number `label`.
    "boolq": QuestionFile(
        "boolq__none__validation.jsonl",
        "validation",
        ("passage", "question", "answer"),
        {"doc_to_target": "{{answer|int}}"},
    ),
    "commonsense_qa": QuestionFile(
        "tau__commonsense_qa__none__validation.jsonl", "validation", _ARC_FIELDS
    ),
    "social_iqa": QuestionFile(
        "social_i_qa__none__validation.jsonl",
        "validation",
        ("context", "question", "answerA", "answerB", "answerC", "label"),
    ),
    "coqa": QuestionFile(
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
    """Return the files of a task that the folder lacks.

    Raises:
        EvaluationError: a line is not a JSON object, or lacks a field.
    """
    files: dict[str, tuple[str, ...]]
    if task.name in MMLU_TASKS:
        files = {file: _MMLU_FIELDS for _, file in _mmlu_files()}
    elif task.name in QUESTION_FILES:
        files = {QUESTION_FILES[task.name].file: QUESTION_FILES[task.name].fields}
    else:
        return [f"`{task.name}` cannot be read from a folder"]
    missing = []
    for file, fields in files.items():
        if (task_data / file).is_file():
            _check_fields(task_data / file, fields)
        else:
            missing.append(file)
    return missing


def all_files() -> list[str]:
    """Return the names of all files that a folder can have, in the order of the tasks."""
    return [local.file for local in QUESTION_FILES.values()] + [file for _, file in _mmlu_files()]


def fingerprint_of_questions(task_data: Path | None) -> str:
    """Return what changes with the files of a folder of questions; a constant without one."""
    found = [] if task_data is None else sorted(task_data.glob("*.jsonl"))
    sums = [(path.name, sha256_of(path)) for path in found]
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()[:16]


def write_task_files(tasks: Sequence[EvalTask], folder: Path, task_data: Path | None) -> list[str]:
    """Write the task files of ``tasks`` and return their names in the harness.

    Args:
        tasks: tasks; those that are not in :data:`megapoly.evaluation.tasks.TASKS` need no file and
            keep their name.
        folder: folder to write to, for ``TaskManager(include_path=folder)``.
        task_data: folder with the questions; None keeps the harness's own source.
    """
    names = []
    for task in tasks:
        if task.name in MMLU_TASKS:
            _write_mmlu(task, folder, task_data)
        elif task.name in QUESTION_FILES:
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
        local = QUESTION_FILES[task.name]
        content |= _data_source(folder, {local.split: task_data / local.file})
        # Always as the "test" split: for other splits the harness does not exclude the question
        # itself from the examples (0.4.13, lm_eval/api/task.py, fewshot_context).
        content |= {"training_split": None, "validation_split": None}
        content |= {"test_split": local.split, "fewshot_split": local.split, **local.overrides}
    elif task.split == "validation":
        content |= {"test_split": None}  # the harness prefers a test split
    _write(folder, content)


def _write_mmlu(task: EvalTask, folder: Path, task_data: Path | None) -> None:
    """Write a file for each subject, and a group whose accuracy is over all questions."""
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
            # With the task files; elsewhere, tables of files that have changed would be reused.
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
    """Check every line now; otherwise an error appears only after all answers are scored."""
    number = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            _check_line(line, f"line {number} of `{path}`", fields)
    if number == 0:
        raise EvaluationError(f"`{path}` has no questions")


def _check_line(line: bytes, place: str, fields: Sequence[str]) -> None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise EvaluationError(
            f"{place} is not a JSON object ({error}); the file must have one per line"
        ) from error
    if not isinstance(record, dict):
        raise EvaluationError(f"{place} is not a JSON object; the file must have one per line")
    lacking = [name for name in fields if record.get(name) is None]
    if lacking:
        raise EvaluationError(
            f"{place} lacks {', '.join(lacking)}; each line must have {', '.join(fields)}"
        )
