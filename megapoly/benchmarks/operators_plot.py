"""Bar chart of the measurements of ``operators.py``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megapoly.benchmarks.round_statistics import digits

FORWARD, BACKWARD, GOAL = "#4477aa", "#ee9944", "#aa3344"


def draw(report: Mapping[str, Any], file: Path) -> None:
    """Write a PNG with the time of both passes and the fraction of a copy's bandwidth by case."""
    cases = report["cases"]
    bars = [len(case["candidates"]) for case in cases]
    figure = Figure(figsize=(11, 0.9 + sum(0.85 + 0.32 * n for n in bars)), layout="constrained")
    axes = figure.subplots(len(cases), 2, squeeze=False, height_ratios=[2 + n for n in bars])
    for (time, bandwidth), case in zip(axes, cases, strict=True):
        _draw_times(time, case)
        _draw_bandwidth(bandwidth, case)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    figure.suptitle(
        f"{report['device_name']}, torch {report['torch']}; median of {report['rounds']} rounds, "
        "lines from lowest to highest",
        x=0.01,
        ha="left",
        fontsize=10,
    )
    figure.savefig(file, format="png", dpi=120)


def _draw_times(axes: Axes, case: Mapping[str, Any]) -> None:
    entries = case["candidates"]
    names = [entry["name"] for entry in entries]
    forward = [entry["forward"]["ms"]["median"] for entry in entries]
    backward = [entry["backward"]["ms"]["median"] for entry in entries]
    axes.barh(names, forward, color=FORWARD, label="forward")
    axes.barh(names, backward, left=forward, color=BACKWARD, label="backward")
    for row, entry in enumerate(entries):
        ms = entry["both"]["ms"]
        end = forward[row] + backward[row]
        spread = [[max(0, end - ms["min"])], [max(0, ms["max"] - end)]]
        axes.errorbar(end, row, xerr=spread, color="black", capsize=2, linewidth=0.8)
        axes.annotate(
            f"{digits(ms['median'])} ms",
            (max(end, ms["max"]), row),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes.set_title(case["title"], loc="left", fontsize=10)
    axes.set_xlabel("milliseconds, forward and backward", fontsize=8)
    axes.margins(x=0.18)
    axes.set_xlim(left=0)
    _tidy(axes)


def _draw_bandwidth(axes: Axes, case: Mapping[str, Any]) -> None:
    entries = case["candidates"]
    for name, shift, color in (("forward", -0.2, FORWARD), ("backward", 0.2, BACKWARD)):
        fractions = [entry[name]["of_copy"]["median"] for entry in entries]
        rows = [row + shift for row in range(len(entries))]
        bars = axes.barh(rows, fractions, height=0.38, color=color)
        axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=7)
    axes.axvline(1, color="grey", linewidth=0.8)
    for goal in {goal["goal"] for goal in case["goals"] if goal["ratio"] == "of_copy"}:
        axes.axvline(goal, color=GOAL, linewidth=1, linestyle="--")
    axes.set_yticks(range(len(entries)), [entry["name"] for entry in entries])
    axes.set_xlabel("fraction of copy_'s bandwidth", fontsize=8)
    axes.set_xlim(0, max(1.1, axes.get_xlim()[1] * 1.08))
    _tidy(axes)


def _tidy(axes: Axes) -> None:
    axes.invert_yaxis()  # the order of the table
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
