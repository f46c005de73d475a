"""Curves of losses, with their difference to a reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from megapoly.study.report import paper
from megapoly.study.report.groups import Entry, RunGroup
from megapoly.study.report.runs import Run
from megapoly.study.report.statistics import paired
from megapoly.study.report.style import LINE, colour, dashes, legend, panels

# Share of the tokens that the vertical range does not look at: losses fall from ln(vocabulary).
_BEGINNING = 0.2


@dataclass(frozen=True)
class Curves:
    """What a figure of curves is of.

    Args:
        group: of the entries.
        entries: lines.
        validation: mean validation loss; false: smoothed training loss.
    """

    group: RunGroup
    entries: Sequence[Entry]
    validation: bool

    @property
    def baseline(self) -> Entry | None:
        """What differences are to: the group's reference, or the first of several lines."""
        if self.group.reference is not None:
            return self.group.reference
        return self.entries[0] if len(self.entries) > 1 else None

    def baseline_of(self, entry: Entry) -> Entry | None:
        """The baseline of one line, which has its options where there is such a run."""
        return self.group.reference_for(entry) or self.baseline

    def curve(self, run: Run) -> dict[int, float | None]:
        """Loss of a run by tokens."""
        return dict(zip(*run.curve(validation=self.validation), strict=True))


def curves_caption(spec: Curves) -> str:
    """What :func:`curves` draws."""
    run = spec.group.runs[0]
    if spec.validation:
        text = "Mean validation loss"
    else:
        text = f"Training loss, mean over the last {run.window_steps} steps"
    text += " against tokens: mean over seeds, band from lowest to highest."
    baseline = spec.baseline
    if baseline is not None and _pairs(spec):
        text += f" Below it the difference to {baseline.label} at the same tokens and seed"
        others = any(entry.variant for entry in spec.entries)
        text += ", with the same options where there is such a run." if others else "."
    if len({entry.lr for entry in spec.entries}) > 1:
        rates = ", ".join(f"{entry.label} {entry.lr:g}" for entry in spec.entries)
        text += f" Learning rates: {rates}."
    return text


def _pairs(spec: Curves) -> dict[str, list[tuple[Run, Run]]]:
    """Runs with the run of their baseline with the same seed, by label."""
    found = {}
    for entry in spec.entries:
        other = spec.baseline_of(entry)
        if other is None or other.label == entry.label:
            continue
        pairs = [(run, other.seeds[s]) for s, run in entry.seeds.items() if s in other.seeds]
        if pairs:
            found[entry.label] = pairs
    return found


def curves(spec: Curves) -> Figure:
    """Curves like Fig. 1, and their difference to the reference."""
    pairs, baseline = _pairs(spec), spec.baseline
    figure, axes = panels((2.6, 2.2) if pairs else (3.2,))
    styles = dashes(spec.entries)
    for entry in spec.entries:
        losses = [spec.curve(run) for run in entry.seeds.values()]
        _band(axes[0], losses, entry, styles[entry.label])
        if entry.label in pairs:
            gaps = [_differences(*map(spec.curve, pair)) for pair in pairs[entry.label]]
            _band(axes[1], gaps, entry, styles[entry.label])
    axes[0].set_ylabel("validation loss" if spec.validation else "training loss")
    if pairs and baseline is not None:
        axes[1].axhline(0, color=colour(baseline), linewidth=LINE)
        axes[1].set_ylabel(f"minus {baseline.label}")
        axes[0].tick_params(labelbottom=False)
    start = spec.group.runs[0].tokens * _BEGINNING
    for panel in axes:
        _tokens_axis(panel, spec.group)
        _look_at(panel, start)
    axes[-1].set_xlabel("tokens")
    legend(figure, axes[0])
    return figure


def _differences(
    run: dict[int, float | None], other: dict[int, float | None]
) -> dict[int, float | None]:
    keyed = {str(k): v for k, v in run.items()}, {str(k): v for k, v in other.items()}
    return {int(k): v for k, v in paired(*keyed).items()}


def _band(
    axes: Axes,
    seeds: Sequence[dict[int, float | None]],
    entry: Entry,
    style: tuple[float, tuple[float, ...] | None],
) -> None:
    """Mean of the seeds and the range between them, where all have a value."""
    tokens = [t for t in seeds[0] if all(s.get(t) is not None for s in seeds)] if seeds else []
    at = [[value for s in seeds if (value := s[token]) is not None] for token in tokens]
    if not at:
        return
    line = colour(entry)
    if len(seeds) > 1:
        low, high = [min(v) for v in at], [max(v) for v in at]
        axes.fill_between(tokens, low, high, color=line, alpha=0.18, linewidth=0)
    means = [sum(v) / len(v) for v in at]
    axes.plot(tokens, means, color=line, linewidth=LINE, linestyle=style, label=entry.label)


def _tokens_axis(axes: Axes, group: RunGroup) -> None:
    axes.set_xlim(0, group.runs[0].tokens)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: paper.short(x) if x else "0"))


def _look_at(axes: Axes, start: float) -> None:
    """Set the vertical range by what lies right of ``start``, bands and level lines, too."""
    lines = [np.column_stack((line.get_xdata(), line.get_ydata())) for line in axes.get_lines()]
    level = [float(line[0, 1]) for line in lines if len(line) and np.ptp(line[:, 1]) == 0]
    bands = [path.vertices for band in axes.collections for path in band.get_paths()]
    points = np.concatenate([*lines, *bands]) if lines or bands else np.empty((0, 2))
    seen = [*level, *points[points[:, 0] >= start, 1].tolist()]
    if len(seen) > 1 and max(seen) > min(seen):
        margin = 0.06 * (max(seen) - min(seen))
        axes.set_ylim(min(seen) - margin, max(seen) + margin)
