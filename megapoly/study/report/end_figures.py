"""Figures of where runs end: final losses, rates, tokens to reach a loss, domains."""

from __future__ import annotations

import math
from collections.abc import Sequence

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
from megapoly.study.report.ranking import Ranking, rankings
from megapoly.study.report.results import Reach, difference, reach, validation_loss, values
from megapoly.study.report.statistics import paired

# Inches.
_ROW, _PAIR_OF_ROWS, _DOT = 0.27, 0.44, 0.1

FINAL_CAPTION = (
    "Every run at its activation's learning rate: a marker for each seed. Between grey lines: the "
    "lines of one ranking that are not in one above, by their means on its seeds (vertical bars). "
    "Two of them are distinguished if their horizontal bars do not overlap; a bar is half as long "
    "as the simultaneous 95\u00a0% interval of a difference. Lines without bars are in no ranking. "
    "Lower is better; dashed: the reference, on the seeds of the ranking."
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
    """Draw a marker for each seed; lines by ranking, the lowest mean first."""
    read = validation_loss()
    ranked = _in_first_ranking(rankings(group, read))
    placed = [entry for _, entries in ranked for entry in entries]
    rest = [e for e in group.entries if e not in placed]
    ordered = [e for e in [*placed, *rest] if any(v is not None for v in values(e, read).values())]
    rows = {entry.label: row for row, entry in enumerate(ordered)}
    figure, axes = _rows(len(ordered))
    points = []
    for entry in ordered:
        losses = [loss for loss in values(entry, read).values() if loss is not None]
        place = [rows[entry.label]] * len(losses)
        axes.plot(losses, place, markersize=5, alpha=0.65, **dots(entry))
        points += [(loss, rows[entry.label], colour(entry)) for loss in losses]
    for ranking, entries in ranked:
        for entry in entries:
            _interval_bar(axes, rows[entry.label], ranking, entry)
        first, last = rows[entries[0].label] - 0.5, rows[entries[-1].label] + 0.5
        if group.reference is not None and group.reference in ranking:
            mean = ranking.mean(group.reference)
            dash = (0.0, (3.0, 3.0))
            axes.plot([mean] * 2, [first, last], color=MUTED, lw=0.8, ls=dash, zorder=0)
        if last < len(ordered) - 0.5:
            axes.axhline(last, color=MUTED, linewidth=0.6)
    axes.set_yticks(range(len(ordered)), [entry.label for entry in ordered])
    axes.set_xlabel("final validation loss")
    axes.set_xlim(robust_limits([x for x, _, _ in points]))
    mark_outliers(axes, "x", points)
    return figure


def _in_first_ranking(found: Sequence[Ranking]) -> list[tuple[Ranking, list[Entry]]]:
    """Return each ranking with the lines that no earlier one has, without empty ones."""
    shown: list[tuple[Ranking, list[Entry]]] = []
    for number, ranking in enumerate(found):
        new = [e for e in ranking.entries if not any(e in before for before in found[:number])]
        if new:
            shown.append((ranking, new))
    return shown


def _interval_bar(axes: Axes, row: float, ranking: Ranking, entry: Entry) -> None:
    """Draw mean and half of the half interval: bars overlap if lines are not distinguished."""
    mean, half = ranking.mean(entry), ranking.fit.half_interval / 2
    axes.plot([mean] * 2, [row - 0.28, row + 0.28], color=colour(entry), linewidth=2)
    axes.plot([mean - half, mean + half], [row] * 2, color=colour(entry), linewidth=1)


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
        "shorter is better. A dot for each seed that reaches it, a bar at their mean if all do. "
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
    kind = "validation" if strong else "training"
    if found is None or not found.tokens:
        text = f"{kind}: not reached" if found else f"{kind}: no curve"
        axes.text(0.012, row, text, va="center", fontsize=7.5, color=MUTED)
        return
    shares = list(found.tokens.values())
    text = f"{kind}: {len(shares)} of {found.seeds} seeds"
    if found.always:
        mean = math.fsum(shares) / len(shares)
        axes.barh(row, mean, height=0.36, color=colour(entry), alpha=0.7 if strong else 0.35)
        text = f"{kind} {mean:.2f}"
    axes.plot(shares, [row] * len(shares), "o", color=INK, markersize=2.5)
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
            axes.plot(found.mean, place, markersize=5, label=label, **dots(entry))
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
