"""Figures of where runs end: final losses, rates, tokens to reach a loss, domains."""

from __future__ import annotations

import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from megapoly.config.data_sources import MEAN
from megapoly.study.figure_style import (
    GRID,
    INK,
    LINE,
    MUTED,
    PAPER,
    legend_above,
    mark_outliers,
    panels,
    robust_limits,
)
from megapoly.study.report import paper
from megapoly.study.report.groups import Entry, RunGroup
from megapoly.study.report.lines import colour, dots, line_styles
from megapoly.study.report.results import Reach, difference, known, reach, validation_loss, values
from megapoly.study.report.statistics import paired

# Inches.
_ROW, _PAIR_OF_ROWS, _DOT = 0.27, 0.44, 0.1

FINAL_CAPTION = (
    "Every run at its activation's learning rate: a marker for each seed, a bar at their mean if "
    "all are finite. Lower is better; dashed: the reference."
)


def _rows(count: int, height: float = _ROW) -> tuple[Figure, Axes]:
    figure, axes = panels((0.75 + height * count,))
    axes[0].set_ylim(count - 0.5, -0.5)
    axes[0].grid(visible=False, axis="y")
    axes[0].tick_params(axis="y", length=0)
    axes[0].spines["left"].set_visible(False)
    return figure, axes[0]


def name_of(group: RunGroup) -> str:
    """Return the reference's label, or nothing if there is no reference."""
    return group.reference.label if group.reference else ""


def final_losses(group: RunGroup) -> Figure:
    """Draw a marker for each seed, the lowest mean first."""
    found = []
    for entry in group.entries:
        numbers = values(entry, validation_loss())
        losses = [loss for loss in numbers.values() if loss is not None]
        mean = known(numbers)
        if losses:
            found.append((mean.mean if mean else math.inf, entry, losses))
    found.sort(key=lambda item: item[0])
    figure, axes = _rows(len(found))
    for row, (middle, entry, losses) in enumerate(found):
        axes.plot(losses, [row] * len(losses), markersize=5, alpha=0.65, **dots(entry))
        if math.isfinite(middle):
            axes.plot([middle] * 2, [row - 0.28, row + 0.28], color=colour(entry), linewidth=2)
    if group.reference is not None:
        own = [m for m, entry, _ in found if entry is group.reference and math.isfinite(m)]
        for middle in own:
            axes.axvline(middle, color=MUTED, linewidth=0.8, linestyle=(0, (3, 3)), zorder=0)
    axes.set_yticks(range(len(found)), [entry.label for _, entry, _ in found])
    axes.set_xlabel("final validation loss")
    points = [(x, row, colour(e)) for row, (_, e, losses) in enumerate(found) for x in losses]
    axes.set_xlim(robust_limits([x for x, _, _ in points]))
    mark_outliers(axes, "x", points)
    return figure


def rates_caption(group: RunGroup) -> str:
    """Describe :func:`learning_rates`."""
    return (
        f"Final {group.ranked_by} loss at each learning rate of the grid, over the seeds that all "
        "rates have; a ring marks the rate that the tables show. A line that falls towards its "
        "end calls for a wider grid. A rate at which a run diverged has no point."
    )


def learning_rates(group: RunGroup) -> Figure:
    """Draw the final loss against the learning rate, one line for each entry."""
    figure, (axes,) = panels((3.1,))
    entries = [entry for entry in group.entries if len(entry.rates) > 1]
    styles = line_styles(entries)
    marked = []
    for entry in entries:
        points = [(lr, score) for lr, score in entry.scores.items() if score is not None]
        marked += [(score, lr, colour(entry)) for lr, score in points]
        axes.plot(
            [lr for lr, _ in points],
            [score for _, score in points],
            **styles[entry.label],
            label=entry.label,
        )
        score = entry.scores[entry.lr]
        if score is not None:
            axes.plot(
                entry.lr,
                score,
                "o",
                markersize=9,
                markerfacecolor="none",
                markeredgecolor=colour(entry),
                markeredgewidth=1.3,
            )
    rates = sorted({lr for entry in entries for lr in entry.tried})
    axes.set_xscale("log")
    axes.set_xticks(rates, [f"{lr:g}" for lr in rates])
    axes.minorticks_off()
    axes.set_xlabel("learning rate")
    axes.set_ylabel(f"final {group.ranked_by} loss")
    axes.set_xlim(axes.get_xlim())
    if marked:
        axes.set_ylim(robust_limits([score for score, _, _ in marked]))
        mark_outliers(axes, "y", marked)
    legend_above(figure, axes)
    return figure


def reach_caption(group: RunGroup) -> str:
    """Describe :func:`reaches`."""
    run = group.runs[0]
    text = (
        "Share of the run after which each activation is first at or below the final loss of "
        f"{name_of(group)} with the same seed, linear between points; 100 % is the whole run, so "
        "shorter is better. Bars: mean of the seeds that reach it; dots: each of these seeds. "
        f"Training loss is the mean over the last {run.window_steps} steps."
    )
    reported = paper.results(group.moe).reach
    if any(entry.activation in reported for entry in group.main):
        text += " Diamonds: the paper's full-size models, training loss."
    return text


def reaches(group: RunGroup) -> Figure:
    """Draw bars of tokens to reach the reference's final loss, by validation and training loss."""
    reference = group.reference
    assert reference is not None
    targets = {e.label: group.reference_for(e) or reference for e in group.entries}
    ordered = [*group.main, *(e for e in group.entries if e not in group.main)]
    others = [entry for entry in ordered if targets[entry.label] is not entry]
    figure, axes = _rows(len(others), _PAIR_OF_ROWS)
    for row, entry in enumerate(others):
        for validation, place in ((True, row - 0.2), (False, row + 0.2)):
            found = reach(entry, targets[entry.label], validation=validation)
            _reach_bar(axes, place, entry, found, validation)
        reported = paper.results(group.moe).reach.get(entry.activation)
        if reported and entry in group.main:
            axes.plot(reported, row + 0.2, "D", color=INK, markersize=4, markerfacecolor=PAPER)
    axes.axvline(1, color=colour(reference), linewidth=LINE)
    axes.set_yticks(range(len(others)), [entry.label for entry in others])
    axes.set_xlim(0, 1.06)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel(f"share of the tokens of {reference.label}")
    return figure


def _reach_bar(axes: Axes, row: float, entry: Entry, found: Reach | None, strong: bool) -> None:
    mean = found.spread if found else None
    kind = "validation" if strong else "training"
    if found is None or mean is None:
        text = f"{kind}: not reached" if found else f"{kind}: no curve"
        axes.text(0.012, row, text, va="center", fontsize=7.5, color=MUTED)
        return
    axes.barh(row, mean.mean, height=0.36, color=colour(entry), alpha=0.7 if strong else 0.35)
    dots = list(found.shares.values())
    axes.plot(dots, [row] * len(dots), "o", color=INK, markersize=2.5)
    text = f"{kind} {mean.mean:.2f}"
    if len(dots) < found.seeds:
        text += f", {len(dots)} of {found.seeds} seeds"
    axes.text(0.012, row, text, va="center", fontsize=7.5, color=INK)


def domains_caption(group: RunGroup) -> str:
    """Describe :func:`domains_figure`."""
    return (
        f"Final validation loss minus that of {name_of(group)} with the same seed, by domain: a "
        "small marker for each seed, a large one at their mean. Left of the line is better."
    )


def domains_figure(group: RunGroup) -> Figure:
    """Draw the differences to the reference in each domain."""
    reference = group.reference
    assert reference is not None
    others = [entry for entry in group.main if entry is not reference]
    names = [*group.runs[0].domains, MEAN]
    step = 0.8 / max(1, len(others))
    figure, axes = _rows(len(names), max(_ROW, _DOT * (len(others) + 1)))
    points = []
    for index, entry in enumerate(others):
        label: str | None = entry.label
        for row, domain in enumerate(names):
            read = validation_loss(domain)
            found = difference(entry, reference, read)
            if found is None:
                continue
            place = row - 0.4 + step * (index + 0.5)
            seeds = list(paired(values(entry, read), values(reference, read)).values())
            axes.plot(seeds, [place] * len(seeds), markersize=2.2, alpha=0.6, **dots(entry))
            axes.plot(found.spread.mean, place, markersize=5, label=label, **dots(entry))
            points += [(gap, place, colour(entry)) for gap in seeds]
            label = None
    for row in range(len(names) - 1):
        axes.axhline(row + 0.5, color=GRID, linewidth=0.7)
    axes.axvline(0, color=colour(reference), linewidth=LINE)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel(f"validation loss minus {reference.label}")
    if points:
        axes.set_xlim(robust_limits([0.0, *(gap for gap, _, _ in points)]))
        mark_outliers(axes, "x", points)
    legend_above(figure, axes)
    return figure
