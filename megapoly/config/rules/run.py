"""Rules on the machine and on the checkpoint that a run starts from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megapoly.config.rules.facts import Facts, Rule


def device_exists(facts: Facts) -> Iterator[str]:
    """CUDA is available when it is requested."""
    if facts.config.training.device == "cuda" and not facts.machine.cuda:
        yield (
            "`training.device` (cuda) needs a CUDA device and PyTorch built for it, and this "
            "process sees none; set cpu, or auto to use CUDA only if it is available"
        )


def transformer_engine_is_usable(facts: Facts) -> Iterator[str]:
    """Transformer Engine is installed, and runs on CUDA only."""
    if not facts.config.model.transformer_engine:
        return
    remedy = "leave it null to use it where it can be used"
    if facts.device == "cpu":
        yield f"`model.transformer_engine` (True) needs `training.device` cuda, not cpu; {remedy}"
    elif not facts.machine.transformer_engine:
        yield (
            "`model.transformer_engine` (True) needs Transformer Engine, which is not installed; "
            f"`pip install 'megapoly[gpu]'`, or {remedy}"
        )


def loading_is_possible(facts: Facts) -> Iterator[str]:
    """Options on what to load from a checkpoint need a checkpoint."""
    checkpoint = facts.config.checkpoint
    if checkpoint.load is None and checkpoint.load_weights_only:
        yield (
            "`checkpoint.load_weights_only` (True) needs `checkpoint.load` (null); name a "
            "checkpoint, or set it to false"
        )
    starts_from_nothing = checkpoint.load is None and not checkpoint.resume
    for name in ("accept_other_data", "accept_other_batch"):
        if getattr(checkpoint, name) and starts_from_nothing:
            yield (
                f"`checkpoint.{name}` (True) has no effect with `checkpoint.resume` (False) "
                "and `checkpoint.load` (null), which start a run from nothing; remove it"
            )


def checkpoint_exists(facts: Facts) -> Iterator[str]:
    """The checkpoint to start from exists."""
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
