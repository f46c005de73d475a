"""Options of an evaluation, and checks of which of them can be used together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megapoly.config import command_line
from megapoly.config.ranges import Range

DEFAULT_BATCH_SIZE = 8
DTYPES = ("auto", *command_line.DTYPES)

# Options of the configuration that have an option of the command.
_SET_BY_COMMAND = {"training.device": "--device", "training.bf16": "--dtype"}
# Options of the configuration that change scores of tasks if several processes evaluate.
_CHANGES_TASKS = ("data.tokenizer", "training.seq_length")


@dataclass(frozen=True)
class EvaluationRequest:
    """Options of ``megapoly evaluate``.

    Args:
        model: Hugging Face folder, checkpoint or run; a string: URL of one of the last two.
        tasks: groups and tasks; may be empty.
        perplexity: evaluate validation sets.
        task_data: folder with the questions; None: the hub or its cache.
        skip_missing: skip tasks whose files are missing in ``task_data``.
        limit: number of questions per task; None: all.
        num_fewshot: examples before each question; None: each task's own number.
        batch_size: sequences per forward pass; None: ``DEFAULT_BATCH_SIZE``.
        add_bos: put before every text what the tokenizer puts there; None: as the checkpoint
            records it, and as the tokenizer does for other projects' folders.
        trust_remote_code: run code in a Hugging Face folder.
        dtype: dtype to compute in; ``auto``: as stored.
        device: device by torch's name; None: a GPU if available.
        output: file for all figures; None: not written.
        overrides: ``--section.field value`` for a checkpoint's configuration.
    """

    model: Path | str
    tasks: tuple[str, ...] = ()
    perplexity: bool = False
    task_data: Path | None = None
    skip_missing: bool = False
    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int | None = None
    add_bos: bool | None = None
    trust_remote_code: bool = False
    dtype: str = "auto"
    device: str | None = None
    output: Path | None = None
    overrides: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """Folder of the model, where that is no URL."""
        return Path(self.model)


def find_problems(
    request: EvaluationRequest, checkpoint: Path | None, num_processes: int
) -> Iterator[str]:
    """Yield a message for everything that cannot be done or has no effect.

    Args:
        request: the options.
        checkpoint: checkpoint of its model; None for a Hugging Face folder.
        num_processes: number of processes in the job.
    """
    if not request.tasks and not request.perplexity:
        yield "nothing to evaluate: give `--tasks NAME ...`, `--perplexity` or both"
    if not request.tasks:
        yield from _without_tasks(request)
    if request.batch_size is not None and request.batch_size not in Range(1, 65_536):
        yield f"`--batch-size` ({request.batch_size}) must be at least 1 and at most 65536"
    if request.limit is not None and request.limit < 1:
        yield f"`--limit` ({request.limit}) must be at least 1; leave it out for all questions"
    if request.num_fewshot is not None and request.num_fewshot not in Range(0, 1000):
        yield f"`--num-fewshot` ({request.num_fewshot}) must not be negative, and at most 1000"
    if checkpoint is None:
        yield from _with_folder(request, num_processes)
        return
    if request.trust_remote_code:
        yield command_line.NO_CODE_TO_TRUST
    if request.perplexity or num_processes > 1:
        yield from _with_engine(request)
    if num_processes == 1 and request.tasks:
        yield from _with_converted_checkpoint(request)


def _without_tasks(request: EvaluationRequest) -> Iterator[str]:
    given = {
        "--task-data": request.task_data is not None,
        "--skip-missing": request.skip_missing,
        "--limit": request.limit is not None,
        "--num-fewshot": request.num_fewshot is not None,
        "--batch-size": request.batch_size is not None,
        "--add-bos": request.add_bos is True,
        "--no-add-bos": request.add_bos is False,
    }
    for name in (name for name, is_given in given.items() if is_given):
        yield f"`{name}` has no effect without `--tasks`; leave it out"


def _with_folder(request: EvaluationRequest, num_processes: int) -> Iterator[str]:
    if request.perplexity:
        yield (
            f"`--perplexity` needs a checkpoint, and {request.model} is a Hugging Face folder; "
            "`megapoly import` converts it to a checkpoint"
        )
    if num_processes > 1:
        yield (
            f"{num_processes} processes can share a checkpoint, but {request.model} is a Hugging "
            "Face folder; start one process, or convert it with `megapoly import`"
        )
    if request.overrides:
        yield (
            f"unknown option: {' '.join(request.overrides)} ({request.model} is a Hugging Face "
            "folder; `--section.field value` is for checkpoints)"
        )


def _with_engine(request: EvaluationRequest) -> Iterator[str]:
    if request.dtype == "float16":
        yield "`--dtype float16`: the engine computes in float32 or bfloat16; give one of these"
    if request.device not in (None, "cpu", "cuda"):
        yield (
            f"`--device {request.device}`: the engine takes cpu or cuda, where each process uses "
            "its own GPU; give one of these"
        )
    for name in _names(request.overrides):
        if name in _SET_BY_COMMAND:
            yield f"`--{name}`: use `{_SET_BY_COMMAND[name]}`, which applies to every evaluation"


def _with_converted_checkpoint(request: EvaluationRequest) -> Iterator[str]:
    if request.overrides and not request.perplexity:
        yield (
            f"{' '.join(request.overrides)} has no effect on tasks in one process, which converts "
            "the checkpoint; leave it out, or start several processes with torchrun"
        )
    for name in _names(request.overrides) if request.perplexity else ():
        if name in _CHANGES_TASKS:
            yield (
                f"`--{name}` would change perplexity but not the tasks, for which one process "
                "converts the checkpoint unchanged; evaluate them with two commands"
            )


def _names(overrides: tuple[str, ...]) -> list[str]:
    return [each[2:].partition("=")[0] for each in overrides if each.startswith("--")]
