"""Spikes: losses and gradient norms of a step that are not finite, or far above recent steps."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from megapoly.config.schema import TrainingConfig

# The median absolute deviation of a normal distribution is sigma / 1.4826.
_SIGMAS_PER_DEVIATION = 1.4826
# Least sigma, relative to the median: values that hardly differ have no noise to compare with.
_LEAST_SIGMA = 0.01
# A checkpoint is ordinary if none of so many steps before it was unusual: the loss may be back
# below the threshold before the weights have recovered.
_STEPS_BEFORE_ORDINARY = 10
# Steps that are remembered as unusual, to say where a spike began.
_MOST_REMEMBERED = 1000


@dataclass(frozen=True)
class Unusual:
    """A value of a step that is not finite or a spike.

    Args:
        name: as in ``metrics.jsonl``: ``lm_loss``, ``grad_norm``, ``z_loss``, ...
        value: of the step.
        median: of recent steps; None if there are too few.
        threshold: largest ordinary value; None likewise.
        num_recent: number of steps that these are of.
    """

    name: str
    value: float
    median: float | None
    threshold: float | None
    num_recent: int

    @property
    def is_finite(self) -> bool:
        """Whether the value is a number."""
        return math.isfinite(self.value)

    def __str__(self) -> str:
        if self.median is None:
            return f"{self.name} {self.value:.6g}"
        return (
            f"{self.name} {self.value:.6g} (median of {self.num_recent} steps {self.median:.6g}, "
            f"threshold {self.threshold:.6g})"
        )


class RecentSteps:
    """What a run remembers of its recent steps: their values, and which were unusual.

    With the values v_1 .. v_n of a loss or of the gradient norm in the last n <=
    ``spike_window`` steps that were trained on, and m their median, a value is a spike above

        m + spike_threshold * max(1.4826 * median_i |v_i - m|, 0.01 |m|)

    once n is at least half of ``spike_window``. Median and absolute deviation are not moved by a
    few outliers, so a spike that was trained on does not hide the next one. Values of skipped steps
    and values that are not finite never enter. Everything is in checkpoints, and floats are
    restored to the bit: a resumed run decides as one that was not stopped.

    Args:
        training: has the ``spike_`` fields.
    """

    def __init__(self, training: TrainingConfig) -> None:
        self._threshold, self._window = training.spike_threshold, training.spike_window
        self._max_skips = training.spike_max_skips
        self._values: dict[str, deque[float]] = {}
        self._unusual: deque[int] = deque(maxlen=_MOST_REMEMBERED)
        self._skipped: list[int] = []  # those that count against the budget
        self.num_skipped = 0  # in the whole run

    def compare(self, values: Mapping[str, float]) -> list[Unusual]:
        """Return the values that are not finite or spikes, in their order."""
        found = (self._compare_one(name, value) for name, value in values.items())
        return [unusual for unusual in found if unusual is not None]

    def _compare_one(self, name: str, value: float) -> Unusual | None:
        recent = self._values.get(name, ())
        if 2 * len(recent) < self._window:
            if math.isfinite(value):
                return None
            return Unusual(name, value, None, None, len(recent))
        middle = median(recent)
        deviation = median(abs(each - middle) for each in recent)
        sigma = max(_SIGMAS_PER_DEVIATION * deviation, _LEAST_SIGMA * abs(middle))
        threshold = middle + self._threshold * sigma
        if value <= threshold:  # never of NaN
            return None if math.isfinite(value) else Unusual(name, value, None, None, len(recent))
        return Unusual(name, value, middle, threshold, len(recent))

    def add(self, step: int, values: Mapping[str, float], *, is_unusual: bool = False) -> None:
        """Remember a step that was trained on.

        Args:
            step: its number.
            values: finite.
            is_unusual: some are spikes.
        """
        for name, value in values.items():
            self._values.setdefault(name, deque(maxlen=self._window)).append(value)
        if is_unusual:
            self._unusual.append(step)

    def skip(self, step: int) -> bool:
        """Remember a skipped step; return whether the budget allows to skip it.

        Without a budget it is remembered as unusual only, because the run ends.
        """
        self._unusual.append(step)
        self._skipped = [each for each in self._skipped if each > step - self._window]
        if len(self._skipped) >= self._max_skips:
            return False
        self._skipped.append(step)
        self.num_skipped += 1
        return True

    def is_ordinary(self, step: int) -> bool:
        """Return whether none of the last steps up to ``step`` was unusual."""
        return not self._unusual or self._unusual[-1] <= step - _STEPS_BEFORE_ORDINARY

    def first_unusual_after(self, step: int) -> int | None:
        """Return the first unusual step after one; None if there is none."""
        return next((each for each in self._unusual if each > step), None)

    def state(self) -> dict[str, Any]:
        """Return everything, for ``run.json``."""
        return {
            "values": {name: list(values) for name, values in self._values.items()},
            "unusual_steps": list(self._unusual),
            "skipped_steps": list(self._skipped),
            "num_skipped": self.num_skipped,
        }

    def restore(self, state: Mapping[str, Any], *, with_values: bool) -> None:
        """Continue from a checkpoint.

        Args:
            state: of :meth:`state`.
            with_values: False: collect values anew, because other data or another batch size has
                other losses and gradient norms.
        """
        values = state["values"] if with_values else {}
        self._values = {name: deque(kept, maxlen=self._window) for name, kept in values.items()}
        self._unusual = deque(state["unusual_steps"], maxlen=_MOST_REMEMBERED)
        self._skipped = list(state["skipped_steps"])
        self.num_skipped = state["num_skipped"]
