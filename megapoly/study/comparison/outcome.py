"""What a trial's folder says about it: how far it is, and how well it did."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megapoly.config.data_sources import MEAN
from megapoly.errors import CheckpointError, DataError

COMPARISON_FILE = "comparison.json"

# Bytes of the end of metrics.jsonl that surely hold its last line.
_TAIL = 1 << 14


def last_record(run_dir: Path) -> dict[str, Any]:
    """The last whole line of ``metrics.jsonl``; empty before the first step."""
    try:
        with (run_dir / "metrics.jsonl").open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - _TAIL))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return {}
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            return record
    return {}


def is_complete(run_dir: Path, steps: int) -> bool:
    """Whether a run has made its last step and saved it."""
    saved = run_dir / "checkpoints" / f"iter_{steps:07d}" / "run.json"
    return saved.exists() and last_record(run_dir).get("iteration") == steps


def validation_loss(record: Mapping[str, Any]) -> float | None:
    """Loss over all validation sets of a step: their mean, or the only one's; None: not evaluated.

    Args:
        record: line of ``metrics.jsonl``.
    """
    losses = {
        key: value
        for key, value in record.items()
        if key.startswith("val/") and key.endswith("/loss")
    }
    mean = losses.get(f"val/{MEAN}/loss")
    return mean if mean is not None else next(iter(losses.values()), None)


def final_validation_loss(run_dir: Path) -> float:
    """Validation loss after the last step of a complete run.

    Raises:
        CheckpointError: the last line has none.
    """
    loss = validation_loss(last_record(run_dir))
    if loss is None:
        raise CheckpointError(
            f"The last line of {run_dir / 'metrics.jsonl'} must hold the validation losses of the "
            "run's end, and does not; delete the run's folder to train it anew."
        )
    return loss


def chosen_runs(folder: Path) -> dict[str, str]:
    """Names of the runs of the first seed at each variant's learning rate, by the variant's name.

    Args:
        folder: of a comparison; empty if it is none, or no variant is done.

    Raises:
        DataError: as :func:`read_comparison`.
    """
    return dict((read_comparison(folder) or {}).get("chosen", {}))


def read_comparison(folder: Path) -> dict[str, Any] | None:
    """Content of ``comparison.json``; None: there is none.

    Raises:
        DataError: the file is damaged.
    """
    path = folder / COMPARISON_FILE
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        missing = {"commands", "trials", "chosen"} - content.keys()
        if missing:
            raise ValueError(f"{' and '.join(sorted(missing))} missing")
    except (ValueError, AttributeError) as error:
        raise DataError(
            f"`{path}` is not as megapoly compare wrote it ({error}). It holds the "
            "times of trials, the choice of rates and which trials diverged; delete it, and the "
            "same command of that tool makes it anew from the runs."
        ) from error
    return dict(content)
