"""TensorBoard's files of a run, ``RUN_DIR/tensorboard``."""

from __future__ import annotations

from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from megapoly.config import to_yaml
from megapoly.training.hooks import Hook, StepRecord
from megapoly.training.state import TrainState

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
    configuration is written as text.

    Args:
        state: the run, restored; TensorBoard hides what was written after its position.
    """

    def __init__(self, state: TrainState) -> None:
        self._state = state
        self._writer = SummaryWriter(
            Path(state.config.run_dir) / "tensorboard", purge_step=state.iteration + 1
        )
        yaml = to_yaml(state.config)
        self._writer.add_text("config", f"```yaml\n{yaml}```", state.iteration)

    def after_record(self, step: StepRecord) -> None:
        """Write the scalars of a step."""
        iteration = self._state.iteration
        always = step.is_evaluated or bool(step.result.unusual)
        due = always or iteration % self._state.config.logging.log_interval == 0
        scalars = (step.metrics if due else {}) | step.details
        for name, value in scalars.items():
            if name != "iteration":
                self._writer.add_scalar(tag_of(name), value, iteration)

    def close(self) -> None:
        """Write what is still buffered."""
        self._writer.close()
