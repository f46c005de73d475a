"""Curves of losses, with their difference to a reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from megapoly.study.figure_style import LINE, legend_above, mark_outliers, panels, robust_limits
from megapoly.study.report import paper
from megapoly.study.report.groups import Entry, RunGroup
from megapoly.study.report.lines import colour, line_styles
from megapoly.study.report.runs import Run
from megapoly.study.report.statistics import paired

# Share of the tokens at the start that the vertical range ignores: losses fall from ln(vocabulary).
_IGNORED = 0.2
# Markers on each line.
_NUM_MARKERS = 8


@dataclass(frozen=True)
class Curves:
    """Content of a figure of curves.

    Args:
        group: of the entries.
        entries: lines.
        validation: draw the mean validation loss; false: the smoothed training loss.
    """

    group: RunGroup
    entries: Sequence[Entry]
    validation: bool

    @property
    def baseline(self) -> Entry | None:
        """Subtrahend of the differences: the group's reference, or the first of several lines."""
        if self.group.reference is not None:
            return self.group.reference
        return self.entries[0] if len(self.entries) > 1 else None

    def baseline_of(self, entry: Entry) -> Entry | None:
        """Return the baseline of one line, with the same options if such a run exists."""
        return self.group.reference_for(entry) or self.baseline

    def curve(self, run: Run) -> dict[int, float | None]:
        """Return the loss of a run by tokens."""
        return dict(zip(*run.curve(validation=self.validation), strict=True))


def curves_caption(spec: Curves) -> str:
    """Describe :func:`curves`."""
    run = spec.group.runs[0]
    if spec.validation:
        text = "Mean validation loss"
    else:
        text = f"Training loss, mean over the last {run.window_steps} steps"
    text += " against tokens: mean over seeds, band from lowest to highest."
    baseline = spec.baseline
    if baseline is not None and _pairs(spec):
        text += f" Below: the difference to {baseline.label} at the same tokens and seed"
        others = any(entry.variant for entry in spec.entries)
        text += ", with the same options if such a run exists." if others else "."
    if len({entry.lr for entry in spec.entries}) > 1:
        rates = ", ".join(f"{entry.label} {entry.lr:g}" for entry in spec.entries)
        text += f" Learning rates: {rates}."
    return text


def _pairs(spec: Curves) -> dict[str, list[tuple[Run, Run]]]:
    """Return runs, each with its baseline's run of the same seed, by label."""
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
    """Draw curves like Fig. 1, and their difference to the reference."""
    pairs, baseline = _pairs(spec), spec.baseline
    figure, axes = panels((2.6, 2.2) if pairs else (3.2,))
    styles = line_styles(spec.entries)
    for i, entry in enumerate(spec.entries):
        style = {"label": entry.label, **styles[entry.label]}
        phase = i / len(spec.entries)
        losses = [spec.curve(run) for run in entry.seeds.values()]
        _band(axes[0], losses, style, phase)
        if entry.label in pairs:
            gaps = [_differences(*map(spec.curve, pair)) for pair in pairs[entry.label]]
            _band(axes[1], gaps, style, phase)
    axes[0].set_ylabel("validation loss" if spec.validation else "training loss")
    if pairs and baseline is not None:
        axes[1].axhline(0, color=colour(baseline), linewidth=LINE)
        axes[1].set_ylabel(f"minus {baseline.label}")
        axes[0].tick_params(labelbottom=False)
    start = spec.group.runs[0].tokens * _IGNORED
    for panel in axes:
        _tokens_axis(panel, spec.group)
        _set_range(panel, start)
    axes[-1].set_xlabel("tokens")
    legend_above(figure, axes[0])
    return figure


def _differences(
    run: dict[int, float | None], other: dict[int, float | None]
) -> dict[int, float | None]:
    keyed = {str(k): v for k, v in run.items()}, {str(k): v for k, v in other.items()}
    return {int(k): v for k, v in paired(*keyed).items()}


def _band(
    axes: Axes, seeds: Sequence[dict[int, float | None]], style: dict[str, Any], phase: float
) -> None:
    """Draw mean and range of the seeds where all have a value.

    Args:
        axes: to draw on.
        seeds: values by tokens.
        style: of the line.
        phase: shift of the markers, of their distance, so that two lines' do not coincide.
    """
    tokens = [t for t in seeds[0] if all(s.get(t) is not None for s in seeds)] if seeds else []
    at = [[value for s in seeds if (value := s[token]) is not None] for token in tokens]
    if not at:
        return
    if len(seeds) > 1:
        low, high = [min(v) for v in at], [max(v) for v in at]
        axes.fill_between(tokens, low, high, color=style["color"], alpha=0.18, linewidth=0)
    means = [sum(v) / len(v) for v in at]
    distance = max(1, len(at) // _NUM_MARKERS)
    axes.plot(tokens, means, markevery=(int(phase * distance), distance), **style)


def _tokens_axis(axes: Axes, group: RunGroup) -> None:
    axes.set_xlim(0, group.runs[0].tokens)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: paper.short(x) if x else "0"))


def _set_range(axes: Axes, start: float) -> None:
    """Set the vertical range by what is right of ``start``: lines, bands and level lines."""
    lines = {line: np.column_stack((line.get_xdata(), line.get_ydata())) for line in axes.lines}
    level = [float(xy[0, 1]) for xy in lines.values() if len(xy) and np.ptp(xy[:, 1]) == 0]
    bands = [path.vertices for band in axes.collections for path in band.get_paths()]
    points = np.concatenate([*lines.values(), *bands]) if lines or bands else np.empty((0, 2))
    seen = [*level, *points[points[:, 0] >= start, 1].tolist()]
    if not seen:
        return
    axes.set_ylim(robust_limits(seen))
    # Of each line the highest and the lowest point.
    extremes = []
    for line, xy in lines.items():
        right = xy[xy[:, 0] >= start]
        for index in {int(right[:, 1].argmin()), int(right[:, 1].argmax())} if len(right) else ():
            extremes.append((float(right[index, 1]), float(right[index, 0]), str(line.get_color())))
    mark_outliers(axes, "y", extremes)
