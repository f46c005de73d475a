"""Going back: to the newest checkpoint of a run that has not trained on batches to pass over."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megapoly.checkpoints.run_folder import complete_checkpoints, newest_ordinary, step_of
from megapoly.config.step_ranges import contain, step_ranges, text_of_steps, until
from megapoly.errors import CheckpointError
from megapoly.training.distributed import is_rank_zero
from megapoly.training.state import TrainState

logger = logging.getLogger(__name__)

_SET_ASIDE = ".set_aside"


def passed_over(position: dict[str, Any]) -> list[range]:
    """Return the steps that the run of a checkpoint's ``run.json`` has passed over."""
    return step_ranges(position.get("passed_over"))


def set_aside_trained(state: TrainState) -> None:
    """Set checkpoints aside that have trained on steps to pass over; collective.

    They are renamed, such as ``iter_0001250.set_aside``: the newest of the others is the run's
    newest checkpoint. Those that the run saves later have passed over these steps, so that the same
    command resumes from them.

    Raises:
        CheckpointError: the run has checkpoints, and none is from before these steps.
    """
    if not state.config.training.skip_batches:
        return
    own = complete_checkpoints(state.config.run_dir)
    trained = {path: steps for path in own if (steps := _trained_on_skipped(state, path))}
    if own and len(trained) == len(own):
        raise CheckpointError(_no_checkpoint_before(own[0], trained[own[0]]))
    dist.barrier()  # all ranks have the same list
    for path, steps in trained.items() if is_rank_zero() else ():
        aside = path.rename(path.with_name(path.name + _SET_ASIDE))
        logger.warning(
            "%s has trained on the batches of step %s, which `training.skip_batches` passes over: "
            "set aside as %s; delete it when it is not needed",
            path,
            text_of_steps(steps),
            aside.name,
        )
    dist.barrier()


def check_skipped(state: TrainState, path: Path) -> None:
    """Refuse a checkpoint, of any run, that has trained on steps to pass over.

    Raises:
        CheckpointError: it has.
    """
    if steps := _trained_on_skipped(state, path):
        raise CheckpointError(_no_checkpoint_before(path, steps))


def way_back(state: TrainState, step: int) -> str:
    """Return how to go on after a run that ends at a step: from which checkpoint, with what option.

    Args:
        state: the run.
        step: the one that ends it.
    """
    own = complete_checkpoints(state.config.run_dir)
    good = newest_ordinary(state.config.run_dir)
    if good is None:
        return (
            "There is no checkpoint with an ordinary loss: start again with a lower "
            "`optimizer.lr` or a longer warm-up"
        )
    first = state.recent_steps.first_unusual_after(step_of(good)) or step
    # Of the checkpoints since then, none has an ordinary loss: go back behind all of them.
    first = min([first, *(step_of(path) for path in own if step_of(path) > step_of(good))])
    steps = text_of_steps([range(first, step + 1)])
    return (
        f"The last checkpoint with an ordinary loss is {good}. The same command resumes from the "
        "newest checkpoint and meets the same batches; with "
        f"`--training.skip_batches [{steps}]` it goes on from {good.name} and passes over the "
        f"batches of step {steps}. If the loss rises again, pass over more of them, or lower "
        "`optimizer.lr`"
    )


def _trained_on_skipped(state: TrainState, path: Path) -> list[range]:
    """Return the steps to pass over that a checkpoint has trained on; none if it cannot be read."""
    try:
        position = json.loads((path / "run.json").read_text())
    except (OSError, ValueError):
        return []  # loading says so
    listed = until(step_ranges(state.config.training.skip_batches), position["iteration"])
    passed = passed_over(position)
    return [steps for steps in listed if not contain(passed, [steps])]


def _no_checkpoint_before(path: Path, steps: list[range]) -> str:
    return (
        f"{path} has trained on the batches of step {text_of_steps(steps)}, which "
        "`training.skip_batches` passes over, and there is no checkpoint from before them; leave "
        "these steps out of the list, or start from another checkpoint with `checkpoint.load`."
    )
