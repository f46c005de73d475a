"""Coefficients of a run's activations during training, from its TensorBoard files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megapoly.platform.json_lines import lines

_PREFIX = "activation/"


def coefficient_series(run: Path | None, iteration: int) -> dict[str, Any]:
    """Read every coefficient of every activation at the steps at which it was written.

    Args:
        run: folder of the run, with ``tensorboard`` and ``metrics.jsonl``; None without a run.
        iteration: last step to read, the checkpoint's.

    Returns:
        ``tokens``: number consumed at each step; ``series`` by tag, such as
        ``activation/layer_00/ffn/a0``, see :mod:`megapoly.training.telemetry`; ``missing``: null,
        or the reason why there are none.
    """
    if run is None or not any((run / "tensorboard").glob("events.out.*")):
        return _nothing("the checkpoint is not in a run with TensorBoard files")
    if not (run / "metrics.jsonl").is_file():
        return _nothing("the run has no metrics.jsonl, which has the tokens of each step")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith(_PREFIX)]
    if not tags:
        return _nothing("the run's activations have no coefficients, or none were written")
    consumed = _consumed_tokens(run / "metrics.jsonl")
    values = {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in tags}
    written = set.intersection(*(set(each) for each in values.values()))
    steps = sorted(step for step in written if step <= iteration and step in consumed)
    return {
        "tokens": [consumed[step] for step in steps],
        "series": {
            tag: [float(f"{values[tag][step]:.7g}") for step in steps] for tag in sorted(tags)
        },
        "missing": None,
    }


def _nothing(why: str) -> dict[str, Any]:
    return {"tokens": [], "series": {}, "missing": why}


def _consumed_tokens(metrics: Path) -> dict[int, int]:
    """Return tokens by step, without damaged lines and one that is still being written."""
    records = (line.record for line in lines(metrics))
    return {
        record["iteration"]: record["consumed_tokens"]
        for record in records
        if record is not None and {"iteration", "consumed_tokens"} <= record.keys()
    }
