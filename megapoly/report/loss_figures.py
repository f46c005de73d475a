"""Figures of losses: curves with their difference to the reference, ends, rates, tokens to reach."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from megapoly.config.data_sources import MEAN
from megapoly.report import paper
from megapoly.report.groups import Entry, Group
from megapoly.report.results import Reach, difference, reach, validation_loss
from megapoly.report.runs import Run
from megapoly.report.statistics import paired, spread
from megapoly.report.style import GRID, INK, MUTED, PAPER, colour, dashes, panels

# Share of the tokens that the vertical range does not look at: losses fall from ln(vocabulary).
_BEGINNING = 0.1
_LINE, _ROW = 1.4, 0.3
# Rows of a legend take so much, in inches.
_LEGEND_ROW = 0.17

FINAL_CAPTION = (
    "Every run at its activation's learning rate: a dot a seed, a bar at their mean. Lower is "
    "better."
)
RATES_CAPTION = (
    "Final validation loss at each learning rate of the grid, of the seeds that all rates have; a "
    "ring marks the rate that the tables are of. A line that falls to its end asks for a wider grid."
)


@dataclass(frozen=True)
class Curves:
    """What a figure of curves is of.

    Args:
        group: of the entries.
        entries: lines.
        validation: mean validation loss; false: smoothed training loss.
    """

    group: Group
    entries: Sequence[Entry]
    validation: bool

    @property
    def baseline(self) -> Entry | None:
        """What differences are to: the group's reference, or the first of several lines."""
        if self.group.reference is not None:
            return self.group.reference
        return self.entries[0] if len(self.entries) > 1 else None

    def curve(self, run: Run) -> dict[int, float | None]:
        """Loss of a run by tokens."""
        kind = run.validation if self.validation else run.training
        return dict(zip(kind["tokens"], kind[MEAN if self.validation else "loss"], strict=True))


def name_of(group: Group) -> str:
    """The reference's label."""
    return group.reference.label if group.reference else ""


def curves_caption(spec: Curves) -> str:
    """What :func:`curves` draws."""
    run = spec.group.runs[0]
    if spec.validation:
        text = "Mean validation loss"
    else:
        text = f"Training loss, mean over the last {run.window_steps} steps"
    text += " against tokens: mean over seeds, band from lowest to highest."
    baseline = spec.baseline
    if baseline is not None and _differs(spec, baseline):
        text += f" Below it the difference to {baseline.label} at the same tokens and seed."
    return text


def _differs(spec: Curves, baseline: Entry) -> bool:
    return any(
        entry.label != baseline.label and set(entry.seeds) & set(baseline.seeds)
        for entry in spec.entries
    )


def curves(spec: Curves) -> Figure:
    """Curves like Fig. 1, and their difference to the reference."""
    baseline = spec.baseline
    below = baseline is not None and _differs(spec, baseline)
    figure, axes = panels((2.6, 2.2) if below else (3.2,))
    styles = dashes(spec.entries)
    for entry in spec.entries:
        losses = [spec.curve(run) for run in entry.seeds.values()]
        _band(axes[0], losses, entry, styles[entry.label])
        if not below or baseline is None or entry.label == baseline.label:
            continue
        pairs = [
            (spec.curve(run), spec.curve(baseline.seeds[seed]))
            for seed, run in entry.seeds.items()
            if seed in baseline.seeds
        ]
        gaps = [_differences(run, other) for run, other in pairs]
        _band(axes[1], gaps, entry, styles[entry.label])
    axes[0].set_ylabel("validation loss" if spec.validation else "training loss")
    if below and baseline is not None:
        axes[1].axhline(0, color=colour(baseline), linewidth=_LINE)
        axes[1].set_ylabel(f"minus {baseline.label}")
        axes[0].tick_params(labelbottom=False)
    start = spec.group.runs[0].tokens * _BEGINNING
    for panel in axes:
        _tokens_axis(panel, spec.group)
        _look_at(panel, start)
    axes[-1].set_xlabel("tokens")
    _legend(figure, axes[0])
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
    axes.plot(tokens, means, color=line, linewidth=_LINE, linestyle=style, label=entry.label)


def _tokens_axis(axes: Axes, group: Group) -> None:
    axes.set_xlim(0, group.runs[0].tokens)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: paper.short(x) if x else "0"))


def _look_at(axes: Axes, start: float) -> None:
    """Set the vertical range by what lies right of ``start``."""
    seen = [
        y
        for line in axes.get_lines()
        for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)
        if x >= start
    ]
    if len(seen) > 1 and max(seen) > min(seen):
        margin = 0.06 * (max(seen) - min(seen))
        axes.set_ylim(min(seen) - margin, max(seen) + margin)


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    # As many as fit beside each other.
    columns = max(1, min(len(labels), 52 // (max(map(len, labels), default=1) + 6)))
    rows = -(-len(labels) // columns)
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + rows * _LEGEND_ROW)
    figure.legend(
        handles,
        labels,
        loc="outside upper left",
        ncols=columns,
        fontsize=8.5,
        handlelength=1.6,
        columnspacing=1.2,
        borderaxespad=0.2,
    )


def _rows(count: int) -> tuple[Figure, Axes]:
    figure, axes = panels((0.75 + _ROW * count,))
    axes[0].set_ylim(count - 0.5, -0.5)
    axes[0].grid(visible=False, axis="y")
    axes[0].tick_params(axis="y", length=0)
    axes[0].spines["left"].set_visible(False)
    return figure, axes[0]


def final_losses(group: Group) -> Figure:
    """A dot a seed, the lowest mean first."""
    found = []
    for entry in group.entries:
        losses = [loss for run in entry.seeds.values() if (loss := run.validation_loss())]
        mean = spread(losses)
        if mean is not None:
            found.append((mean.mean, entry, losses))
    found.sort(key=lambda item: item[0])
    figure, axes = _rows(len(found))
    for row, (mean, entry, losses) in enumerate(found):
        axes.plot(losses, [row] * len(losses), "o", color=colour(entry), markersize=5, alpha=0.65)
        axes.plot([mean] * 2, [row - 0.28, row + 0.28], color=colour(entry), linewidth=2)
    if group.reference is not None:
        own = [mean for mean, entry, _ in found if entry is group.reference]
        for mean in own:
            axes.axvline(mean, color=MUTED, linewidth=0.8, linestyle=(0, (3, 3)), zorder=0)
    axes.set_yticks(range(len(found)), [entry.label for _, entry, _ in found])
    axes.set_xlabel("final validation loss")
    axes.margins(x=0.06)
    return figure


def learning_rates(group: Group) -> Figure:
    """Final validation loss against the learning rate, a line an entry."""
    figure, (axes,) = panels((3.1,))
    entries = [entry for entry in group.entries if len(entry.rates) > 1]
    styles = dashes(entries)
    for entry in entries:
        points = [(lr, score) for lr, score in entry.scores.items() if score is not None]
        axes.plot(
            [lr for lr, _ in points],
            [score for _, score in points],
            "o",
            color=colour(entry),
            markersize=3.5,
            linewidth=_LINE,
            linestyle=styles[entry.label],
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
    rates = sorted({lr for entry in entries for lr in entry.rates})
    axes.set_xscale("log")
    axes.set_xticks(rates, [f"{lr:g}" for lr in rates])
    axes.minorticks_off()
    axes.set_xlabel("learning rate")
    axes.set_ylabel("final validation loss")
    _legend(figure, axes)
    return figure


def reach_caption(group: Group) -> str:
    """What :func:`reaches` draws."""
    run = group.runs[0]
    text = (
        f"Share of the run after which each is first at or below the final loss of {name_of(group)} "
        "with the same seed, linear between points; 100 % is the whole run, so shorter is better. "
        "Bars: mean of the seeds that reach it, dots: each of them. Training loss is the mean over "
        f"the last {run.window_steps} steps."
    )
    reported = paper.results(group.moe).reach
    if any(entry.activation in reported for entry in group.main):
        text += " Diamonds: the paper's full-size models, training loss."
    return text


def reaches(group: Group) -> Figure:
    """Bars of tokens to reach the reference's final loss, by validation and by training loss."""
    reference = group.reference
    assert reference is not None
    others = [entry for entry in group.main if entry is not reference]
    others += [entry for entry in group.entries if entry not in group.main]
    figure, axes = _rows(2 * len(others))
    names = []
    for index, entry in enumerate(others):
        for kind, validation in enumerate((True, False)):
            row = 2 * index + kind
            _reach_bar(axes, row, entry, reach(entry, reference, validation=validation), validation)
            names.append(f"{entry.label}, {'validation' if validation else 'training'}")
        reported = paper.results(group.moe).reach.get(entry.activation)
        if reported and entry in group.main:
            place = 2 * index + 1
            axes.plot(reported, place, "D", color=INK, markersize=5, markerfacecolor=PAPER)
    axes.axvline(1, color=colour(reference), linewidth=_LINE)
    axes.set_yticks(range(2 * len(others)), names)
    axes.set_xlim(0, 1.12)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel(f"share of the tokens of {reference.label}")
    return figure


def _reach_bar(axes: Axes, row: int, entry: Entry, found: Reach | None, strong: bool) -> None:
    mean = found.spread if found else None
    if found is None or mean is None:
        text = "not reached" if found else "no evaluation before the end"
        axes.text(0.01, row, text, va="center", fontsize=8, color=MUTED)
        return
    axes.barh(row, mean.mean, height=0.62, color=colour(entry), alpha=0.75 if strong else 0.35)
    dots = list(found.shares.values())
    axes.plot(dots, [row] * len(dots), "o", color=INK, markersize=3)
    text = f"{mean.mean:.2f}"
    if len(dots) < found.seeds:
        text += f", {len(dots)} of {found.seeds} seeds"
    axes.text(0.02, row, text, va="center", fontsize=8, color=INK)


def domains_caption(group: Group) -> str:
    """What :func:`domains_figure` draws."""
    return (
        f"Final validation loss minus that of {name_of(group)} of the same seed, by domain: a small "
        "dot a seed, a large one their mean. Left of the line is better."
    )


def domains_figure(group: Group) -> Figure:
    """Differences to the reference in each domain."""
    reference = group.reference
    assert reference is not None
    others = [entry for entry in group.main if entry is not reference]
    names = [*group.runs[0].domains, MEAN]
    step = 0.8 / max(1, len(others))
    figure, axes = _rows(len(names) * max(1, len(others) // 2))
    axes.set_ylim(len(names) - 0.5, -0.5)
    for index, entry in enumerate(others):
        label: str | None = entry.label
        for row, domain in enumerate(names):
            read = validation_loss(domain)
            found = difference(entry, reference, read)
            if found is None:
                continue
            place = row - 0.4 + step * (index + 0.5)
            seeds = [
                mine - theirs
                for seed, run in entry.seeds.items()
                if seed in reference.seeds
                and (mine := read(run)) is not None
                and (theirs := read(reference.seeds[seed])) is not None
            ]
            line = colour(entry)
            axes.plot(seeds, [place] * len(seeds), "o", color=line, markersize=2.2, alpha=0.6)
            axes.plot(
                found.spread.mean, place, "o", color=line, markersize=5, linestyle="", label=label
            )
            label = None
    for row in range(len(names) - 1):
        axes.axhline(row + 0.5, color=GRID, linewidth=0.7)
    axes.axvline(0, color=colour(reference), linewidth=_LINE)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel(f"validation loss minus {reference.label}")
    _legend(figure, axes)
    return figure
