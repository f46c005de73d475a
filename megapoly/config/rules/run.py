"""Rules on the machine and on what a run goes on from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megapoly.config.rules.facts import Facts, Rule


def device_exists(facts: Facts) -> Iterator[str]:
    """CUDA is there when it is asked for."""
    if facts.config.training.device == "cuda" and not facts.machine.cuda:
        yield (
            "`training.device` (cuda) needs a CUDA device and PyTorch built for it, and this "
            "process sees none; set cpu, or auto to take what there is"
        )


def transformer_engine_is_usable(facts: Facts) -> Iterator[str]:
    """Transformer Engine is installed, and runs on CUDA only."""
    if not facts.config.model.transformer_engine:
        return
    remedy = "leave it null, which takes it when it can be used"
    if facts.device == "cpu":
        yield f"`model.transformer_engine` (True) needs `training.device` cuda, not cpu; {remedy}"
    elif not facts.machine.transformer_engine:
        yield (
            "`model.transformer_engine` (True) needs Transformer Engine, which is not installed; "
            f"`pip install '.[gpu]'`, or {remedy}"
        )


def loading_is_possible(facts: Facts) -> Iterator[str]:
    """What to take from a checkpoint needs a checkpoint."""
    checkpoint = facts.config.checkpoint
    if checkpoint.load is None and checkpoint.load_weights_only:
        yield (
            "`checkpoint.load_weights_only` (True) needs `checkpoint.load` (null); name a "
            "checkpoint, or set it to false"
        )
    if checkpoint.accept_other_data and checkpoint.load is None and not checkpoint.resume:
        yield (
            "`checkpoint.accept_other_data` (True): nothing reads this with `checkpoint.resume` "
            "(False) and `checkpoint.load` (null), which begin anew; leave it out"
        )


def checkpoint_exists(facts: Facts) -> Iterator[str]:
    """The checkpoint to start from is there."""
    checkpoint = facts.config.checkpoint
    if checkpoint.load is not None and not Path(checkpoint.load).exists():
        yield (
            f"`checkpoint.load` ({checkpoint.load}) does not exist; give a folder such as "
            "RUN_DIR/checkpoints/iter_0000100"
        )


RULES: tuple[Rule, ...] = (
    device_exists,
    transformer_engine_is_usable,
    loading_is_possible,
    checkpoint_exists,
)
