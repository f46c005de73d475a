"""Read progress and final losses from the folder of a trial or of a comparison."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megapoly.checkpoints.run_folder import checkpoint_path
from megapoly.config.data_sources import MEAN
from megapoly.errors import CheckpointError, DataError
from megapoly.platform import json_lines

COMPARISON_FILE = "comparison.json"


def last_record(run_dir: Path) -> dict[str, Any]:
    """Return the last whole line of ``metrics.jsonl``; empty before the first step."""
    return json_lines.last_record(run_dir / "metrics.jsonl")


def is_complete(run_dir: Path, steps: int) -> bool:
    """Return whether a run has made its last step and saved it."""
    saved = checkpoint_path(run_dir, steps) / "run.json"
    return saved.exists() and last_record(run_dir).get("iteration") == steps


def validation_loss(record: Mapping[str, Any]) -> float | None:
    """Return a step's loss over all validation sets, or on the only one.

    Args:
        record: line of ``metrics.jsonl``.

    Returns:
        The mean over sets; None if the step was not evaluated.
    """
    losses = {
        key: value
        for key, value in record.items()
        if key.startswith("val/") and key.endswith("/loss")
    }
    mean = losses.get(f"val/{MEAN}/loss")
    return mean if mean is not None else next(iter(losses.values()), None)


def final_validation_loss(run_dir: Path) -> float:
    """Return the validation loss after the last step of a complete run.

    Raises:
        CheckpointError: the last line has none.
    """
    loss = validation_loss(last_record(run_dir))
    if loss is None:
        raise CheckpointError(
            f"The last line of {run_dir / 'metrics.jsonl'} must contain the final validation "
            "losses, and does not; delete the run's folder to train it again."
        )
    return loss


def chosen_runs(folder: Path) -> dict[str, str]:
    """Return the names of the first seed's runs at the chosen rates, by the variant's name.

    Args:
        folder: of a comparison.

    Returns:
        Empty if the folder is not a comparison, or no variant is done.

    Raises:
        DataError: as :func:`read_comparison`.
    """
    return dict((read_comparison(folder) or {}).get("chosen", {}))


def read_comparison(folder: Path) -> dict[str, Any] | None:
    """Return the content of ``comparison.json``; None if the file does not exist.

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
    except (ValueError, AttributeError, RecursionError) as error:
        raise DataError(
            f"`{path}` is not a file of megapoly compare, or is damaged ({error}). It records the "
            "times of trials, the chosen rates and which trials diverged; delete it, and run the "
            "same megapoly compare command to write it again from the runs."
        ) from error
    return dict(content)
