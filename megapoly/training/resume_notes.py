"""What a run that resumes does otherwise than its checkpoint's configuration says, as lines."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megapoly.config import Config, load_yaml
from megapoly.config.parsing import to_dict
from megapoly.training.load_checkpoint import read_position
from megapoly.training.optimizer import learning_rate_at, train_samples
from megapoly.training.state import Position, TrainState

# What changes neither weights nor the rate: names, and sections or beginnings of names. Sources,
# order and tokenizer of the data are compared by their content (data/fingerprint.py).
_WITHOUT_EFFECT = (
    "run_dir",
    "checkpoint.",
    "logging.",
    "data.blend",
    "data.cache_dir",
    "data.num_workers",
    "data.tokenizer",
    "data.validation",
    "model.make_vocab_size_divisible_by",
    "parallel.distributed_timeout_minutes",
    "parallel.hang_timeout_s",
    "training.eval_",
)


def resume_notes(state: TrainState, path: Path, *, num_processes: int) -> list[str]:
    """Return what differs between a checkpoint's configuration and the run that resumes from it.

    That is every option with an effect on training, the end of the run, and the learning rate of
    the next step if the checkpoint's schedule has another one there.

    Args:
        state: the run, restored.
        path: what it was restored from, an ``iter_*`` folder.
        num_processes: processes of the job.

    Returns:
        Lines for the user; none if only weights were loaded.
    """
    if state.start == Position():
        return []
    saved = load_yaml(path / "config.yaml")
    changes = changed_options(saved, state.config)
    before = read_position(path)["layout"]["world_size"]
    if before != num_processes:
        changes.append(f"processes {before} -> {num_processes}")
    lines = [f"changed since the checkpoint: {', '.join(changes)}"] if changes else []
    return [*lines, *_end(state, saved), *_rate(state, saved)]


def changed_options(saved: Config, current: Config) -> list[str]:
    """Return the options with an effect on training that differ, as "`NAME` OLD -> NEW".

    Args:
        saved: resolved.
        current: resolved.
    """
    before, here = _flat(to_dict(saved)), _flat(to_dict(current))
    return [
        f"`{name}` {_shown(before[name])} -> {_shown(value)}"
        for name, value in here.items()
        if before[name] != value and not name.startswith(_WITHOUT_EFFECT)
    ]


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in config.items():
        section = isinstance(value, dict)
        flat |= {f"{name}.{key}": v for key, v in value.items()} if section else {name: value}
    return flat


def _shown(value: Any) -> str:
    """Return a value as it stands in YAML, on one line."""
    return value if isinstance(value, str) else json.dumps(value)


def _end(state: TrainState, saved: Config) -> Iterator[str]:
    before, here = train_samples(saved), train_samples(state.config)
    if before != here:
        yield (
            f"the run ends after {here:,} samples, at step {state.train_iters:,}; by the "
            f"checkpoint's configuration after {before:,}"
        )
    if state.iteration >= state.train_iters:
        yield (
            f"nothing is left to train: the checkpoint is after {state.consumed_samples:,} samples "
            f"of {here:,}"
        )


def _rate(state: TrainState, saved: Config) -> Iterator[str]:
    """Yield the rate of the next step, if the checkpoint's schedule has another one there."""
    here, before = state.learning_rate, learning_rate_at(saved, state.start.samples)
    if state.iteration >= state.train_iters or math.isclose(here, before, rel_tol=1e-6):
        return
    line = (
        f"learning rate of step {state.iteration + 1}: {here:.2e}; by the checkpoint's schedule "
        f"{before:.2e}"
    )
    optimizer, batch = saved.optimizer, saved.training.global_batch_size
    assert optimizer.lr_decay_iters is not None, "resolved"
    decay = optimizer.lr_decay_iters * batch
    own_batch = state.config.training.global_batch_size
    stable = decay - (optimizer.lr_wsd_decay_iters or 0) * batch
    if optimizer.lr_decay_style == "WSD" and state.start.samples > stable:
        step = state.iteration - (state.start.samples - stable) // batch
        line += (
            f". The checkpoint is inside the decay of WSD, after step {step}: to train on at the "
            "stable rate, start another `run_dir` from a checkpoint up to that step, with "
            "`--checkpoint.load`"
        )
    elif optimizer.lr_decay_style != "constant" and decay % own_batch == 0:
        steps = decay // own_batch
        if steps != state.config.optimizer.lr_decay_iters:
            line += f". `--optimizer.lr_decay_iters {steps}` keeps the length of its decay"
    yield line
