"""What an evaluation is asked for, and what of it nothing would read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Those that --device and --dtype set, each with the way to say it.
_SET_OTHERWISE = {"training.device": "--device", "training.bf16": "--dtype"}
# Of the checkpoint's configuration, what the scores of tasks depend on at several processes.
_OF_TASKS = ("data.tokenizer", "training.seq_length")


@dataclass(frozen=True)
class EvaluationRequest:
    """The command line.

    Args:
        model: Hugging Face folder, checkpoint or run.
        tasks: groups and tasks; empty: none.
        perplexity: evaluate validation sets.
        task_data: folder with the questions; None: the hub or its cache.
        skip_missing: leave out tasks that ``task_data`` lacks.
        limit: questions of each task; None: all.
        num_fewshot: examples before each question; None: each task's own.
        batch_size: sequences at a time; None: the default.
        add_bos: put before every text what the tokenizer puts there.
        dtype: to compute in; ``auto``: as stored.
        device: as torch names it; None: a GPU if there is one.
        json: file for all figures; None: none.
        words: ``--section.field value``, of a checkpoint's configuration.
    """

    model: Path
    tasks: tuple[str, ...] = ()
    perplexity: bool = False
    task_data: Path | None = None
    skip_missing: bool = False
    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int | None = None
    add_bos: bool = False
    dtype: str = "auto"
    device: str | None = None
    json: Path | None = None
    words: tuple[str, ...] = ()


def find_problems(
    asked: EvaluationRequest, checkpoint: Path | None, num_processes: int
) -> Iterator[str]:
    """Yield what cannot be done, each with the reason and a remedy.

    Args:
        asked: the command line.
        checkpoint: that its model is; None: a Hugging Face folder.
        num_processes: of the job.
    """
    if not asked.tasks and not asked.perplexity:
        yield "nothing is asked for; give `--tasks NAME ...`, `--perplexity` or both"
    if not asked.tasks:
        yield from _without_tasks(asked)
    if asked.batch_size is not None and asked.batch_size < 1:
        yield f"`--batch-size` ({asked.batch_size}) must be at least 1"
    if asked.limit is not None and asked.limit < 1:
        yield f"`--limit` ({asked.limit}) must be at least 1; leave it out for all questions"
    if asked.num_fewshot is not None and asked.num_fewshot < 0:
        yield f"`--num-fewshot` ({asked.num_fewshot}) must not be negative"
    if checkpoint is None:
        yield from _of_a_folder(asked, num_processes)
        return
    if asked.perplexity or num_processes > 1:
        yield from _of_the_engine(asked)
    if num_processes == 1 and asked.tasks:
        yield from _of_a_converted_checkpoint(asked)


def _without_tasks(asked: EvaluationRequest) -> Iterator[str]:
    given = {
        "--task-data": asked.task_data is not None,
        "--skip-missing": asked.skip_missing,
        "--limit": asked.limit is not None,
        "--num-fewshot": asked.num_fewshot is not None,
        "--batch-size": asked.batch_size is not None,
        "--add-bos": asked.add_bos,
    }
    for name in (name for name, is_given in given.items() if is_given):
        yield f"`{name}`: nothing reads this without `--tasks`; leave it out"


def _of_a_folder(asked: EvaluationRequest, num_processes: int) -> Iterator[str]:
    if asked.perplexity:
        yield (
            f"`--perplexity` needs a checkpoint, and {asked.model} is a Hugging Face folder; "
            "megapoly import makes a checkpoint of it"
        )
    if num_processes > 1:
        yield (
            f"{num_processes} processes can share a checkpoint, and {asked.model} is a Hugging "
            "Face folder; start one process, or make a checkpoint by megapoly import"
        )
    if asked.words:
        yield (
            f"unknown option: {' '.join(asked.words)} ({asked.model} is a Hugging Face folder; "
            "`--section.field value` is for checkpoints)"
        )


def _of_the_engine(asked: EvaluationRequest) -> Iterator[str]:
    if asked.dtype == "float16":
        yield "`--dtype float16`: the engine computes in float32 or bfloat16; give one of them"
    if asked.device not in (None, "cpu", "cuda"):
        yield (
            f"`--device {asked.device}`: the engine takes cpu or cuda, for each process its own; "
            "give one of them"
        )
    for name in _names(asked.words):
        if name in _SET_OTHERWISE:
            yield f"`--{name}`: give `{_SET_OTHERWISE[name]}`, which is for every evaluation"


def _of_a_converted_checkpoint(asked: EvaluationRequest) -> Iterator[str]:
    if asked.words and not asked.perplexity:
        yield (
            f"{' '.join(asked.words)}: nothing reads this where one process evaluates tasks on a "
            "checkpoint, which it converts; leave it out, or start several processes by torchrun"
        )
    for name in _names(asked.words) if asked.perplexity else ():
        if name in _OF_TASKS:
            yield (
                f"`--{name}` would change perplexity and not the tasks, for which one process "
                "converts the checkpoint as it is; ask for each by itself"
            )


def _names(words: tuple[str, ...]) -> list[str]:
    return [word[2:].partition("=")[0] for word in words if word.startswith("--")]
