"""TensorBoard's files of a run, ``RUN_DIR/tensorboard``."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from megapoly.config import to_yaml
from megapoly.platform.files import free_space
from megapoly.training.hooks import Hook, StepRecord, is_due
from megapoly.training.state import TrainState

_METRICS = "metrics.jsonl"

# The group of a tag is the part before its first slash. TensorBoard 2.21 sorts groups by character
# code and opens the first two: capitals are before small letters, so the losses are shown first.
_TAGS = {
    "lm_loss": "Train/loss",
    "grad_norm": "optimizer/grad_norm",
    "learning_rate": "optimizer/learning_rate",
    "spike": "optimizer/spike",
    "skipped_steps": "optimizer/skipped_steps",
}


def tag_of(name: str) -> str:
    """Return TensorBoard's tag of a scalar: ``Train/loss`` of ``lm_loss``.

    Names with a group keep it, but ``val/`` becomes ``Val/``. Auxiliary losses are in the group
    ``router``, other names without a group, such as ``step_time_s``, in ``throughput``.
    """
    if name in _TAGS:
        return _TAGS[name]
    if "/" in name:
        return f"Val/{name[4:]}" if name.startswith("val/") else name
    return f"{'router' if name.endswith('_loss') else 'throughput'}/{name}"


class TensorBoardHook(Hook):
    """Writes the metrics every ``logging.log_interval`` steps, and details whenever a step has any.

    The metrics of a step with an evaluation and of an unusual step are always written. The
    configuration is written as text. When the disk takes no more, scalars are left out until it
    does, tried every ``checkpoint.save_interval`` steps; ``metrics.jsonl`` has them.

    Args:
        state: the run, restored; TensorBoard hides what was written after its position.
        show: shows a line to the user.
    """

    def __init__(self, state: TrainState, show: Callable[[str], None]) -> None:
        self._state, self._show = state, show
        self._folder = Path(state.config.run_dir) / "tensorboard"
        self._writer: SummaryWriter | None = None
        self._is_failing = False
        self._closing = contextlib.ExitStack()
        self._closing.enter_context(_failures_of_the_writing_thread_unprinted())
        self._open()

    def _open(self) -> None:
        """Begin a file; it is written and flushed once, so that a full disk is noticed here."""
        with self._noting_failures():
            self._writer = SummaryWriter(self._folder, purge_step=self._state.iteration + 1)
            yaml = to_yaml(self._state.config)
            self._writer.add_text("config", f"```yaml\n{yaml}```", self._state.iteration)
            self._writer.flush()
            if self._is_failing:
                self._is_failing = False
                self._show(f"{self._folder} is written again; {_METRICS} has what it lacks")

    def after_record(self, step: StepRecord) -> None:
        """Write the scalars of a step."""
        iteration, config = self._state.iteration, self._state.config
        if self._writer is None:
            if is_due(self._state, config.checkpoint.save_interval):
                self._open()
            return
        always = step.is_evaluated or bool(step.result.unusual)
        due = always or iteration % config.logging.log_interval == 0
        scalars = (step.metrics if due else {}) | step.details
        with self._noting_failures():
            for name, value in scalars.items():
                if name != "iteration":
                    self._writer.add_scalar(tag_of(name), value, iteration)

    def close(self) -> None:
        """Write what is still buffered."""
        with self._closing, self._noting_failures():
            if self._writer is not None:
                self._writer.close()

    @contextlib.contextmanager
    def _noting_failures(self) -> Iterator[None]:
        """Warn about the first of a row of failures, of this write or of those before it."""
        try:
            yield
        except OSError as error:
            self._writer = None
            if not self._is_failing:
                self._is_failing = True
                self._show(
                    f"warning: {self._folder} cannot be written: {error.strerror}; "
                    f"{free_space(self._folder)}. Training goes on, {_METRICS} has all scalars"
                )


@contextlib.contextmanager
def _failures_of_the_writing_thread_unprinted() -> Iterator[None]:
    """Print no traceback of TensorBoard's thread: its next call raises the same error."""
    print_failure = threading.excepthook

    def print_others(failure: threading.ExceptHookArgs) -> None:
        if type(failure.thread).__name__ != "_AsyncWriterThread":
            print_failure(failure)

    threading.excepthook = print_others
    try:
        yield
    finally:
        threading.excepthook = print_failure
