"""The look of all figures: one colour and marker for each activation, and matplotlib's settings."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

# Inches; 413 CSS pixels, so that letters stay readable on a phone that is 360 wide.
WIDTH = 4.3
DPI = 160
LINE = 1.4
PNG_COLOURS = 128
INK, MUTED, GRID, PAPER = "#1d1d21", "#6c6c75", "#e6e6ea", "#ffffff"
# Values are outliers if their distance from the nearer quartile is above this many times the
# distance between the quartiles, and if they are at most this share of all values.
OUTLIER_DISTANCE, OUTLIER_SHARE = 4.0, 0.1
_LEGEND_ROW = 0.17  # inches
_MARGIN = 0.06  # of an axis, on either side


@dataclass(frozen=True)
class ActivationStyle:
    """How an activation looks in every figure.

    Args:
        light: colour on white.
        dark: colour on the dark page.
        marker: of matplotlib; it distinguishes activations in greyscale.
    """

    light: str
    dark: str
    marker: str


STYLES = {
    "swiglu": ActivationStyle("#8a5a2b", "#c89a6a", "o"),
    "geglu": ActivationStyle("#a57a58", "#d8b899", "p"),
    "gelu": ActivationStyle("#2f7d4f", "#63bd88", "^"),
    "silu": ActivationStyle("#6b9440", "#a9cf7c", "<"),
    "relu": ActivationStyle("#3b6fb6", "#7fa8e6", "s"),
    "squared_relu": ActivationStyle("#3690b5", "#7fcbe8", "h"),
    "polyrelu": ActivationStyle("#b97c15", "#f0b45a", "D"),
    "polyprelu": ActivationStyle("#9c8a20", "#ecd07a", ">"),
    "polynorm": ActivationStyle("#b3273f", "#f2738a", "v"),
    "polyrelunorm": ActivationStyle("#cf6a8a", "#f0a0b8", "P"),
    "gated_polynorm": ActivationStyle("#7a4fa3", "#b994e0", "X"),
}
_SETTINGS = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.0,
    "text.color": INK,
    "figure.facecolor": PAPER,
    "axes.facecolor": "none",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.0,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "lines.linewidth": LINE,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "megapoly",
}


@contextmanager
def drawing() -> Iterator[None]:
    """Apply matplotlib's settings while a figure is drawn or saved."""
    with rc_context(_SETTINGS):
        yield


def panels(
    heights: Sequence[float], title: str = "", *, grid: bool = True
) -> tuple[Figure, list[Axes]]:
    """Return a figure of panels below each other, of these heights in inches."""
    height = sum(heights) + (0.4 if title else 0.0)
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel in axes:
        panel.grid(visible=grid)
    if title:
        set_title(figure, title)
    return figure, list(axes)


def set_title(figure: Figure, title: str) -> None:
    """Put a title above everything, at the left."""
    figure.suptitle(title, x=0.02, ha="left", fontsize=10, fontweight="bold")


def legend_above(figure: Figure, axes: Axes) -> None:
    """Name the lines of a panel above all panels, in as many columns as fit."""
    handles, labels = axes.get_legend_handles_labels()
    columns = max(1, min(len(labels), 46 // (max(map(len, labels), default=1) + 6)))
    rows = -(-len(labels) // columns)
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + rows * _LEGEND_ROW)
    figure.legend(
        handles,
        labels,
        loc="outside upper left",
        ncols=columns,
        handlelength=2.2,
        columnspacing=1.2,
        borderaxespad=0.2,
    )


def legend_below(figure: Figure, names: Mapping[str, Any]) -> None:
    """Name several lines below the figure; a single line needs no legend."""
    if len(names) > 1:
        figure.legend(
            list(names.values()),
            list(names),
            ncols=min(len(names), 4 if max(map(len, names)) < 12 else 2),
            loc="outside lower center",
        )


def activation_line(activation: str, repetition: int = 0) -> dict[str, Any]:
    """Return colour and marker of an activation's line, as arguments of ``Axes.plot``.

    Args:
        activation: name in the registry.
        repetition: number of earlier lines of this activation; the marker of a later one is hollow.
    """
    style = STYLES[activation]
    return {
        "color": style.light,
        "marker": style.marker,
        "fillstyle": "none" if repetition else "full",
        "markersize": 4,
    }


def robust_limits(values: Sequence[float]) -> tuple[float, float]:
    """Return the limits of an axis that shows the values, apart from outliers.

    If both quartiles are equal no value is an outlier.
    """
    lower, upper = np.quantile(values, (0.25, 0.75))
    distance = OUTLIER_DISTANCE * (upper - lower)
    usual = [value for value in values if lower - distance <= value <= upper + distance]
    if distance and len(values) - len(usual) <= OUTLIER_SHARE * len(values):
        values = usual
    margin = _MARGIN * (max(values) - min(values)) or _MARGIN
    return float(min(values) - margin), float(max(values) + margin)


def mark_outliers(
    axes: Axes, axis: Literal["x", "y"], points: Sequence[tuple[float, float, str]]
) -> None:
    """Mark values beyond an axis by an arrow at its edge, with the value; the axis label says so.

    Args:
        axes: with its final limits and label along ``axis``.
        axis: along which the values are.
        points: value, position on the other axis, and colour. Several values beyond the same edge
            at one position share an arrow.
    """
    low, high = axes.get_xlim() if axis == "x" else axes.get_ylim()
    beyond: dict[tuple[bool, float, str], list[float]] = {}
    for value, position, colour in points:
        if not low <= value <= high:
            beyond.setdefault((bool(value > high), position, colour), []).append(value)
    for (above, position, colour), values in beyond.items():
        texts = dict.fromkeys(f"{value:.3f}" for value in (min(values), max(values)))
        edge = 1.0 if above else 0.0
        inward = -1 if above else 1
        place, offset, arrow = (edge, position), (inward * 6, 0), "<>"[above]
        transform = axes.get_yaxis_transform()
        if axis == "y":
            place, offset, arrow = (position, edge), (0, inward * 6), "v^"[above]
            transform = axes.get_xaxis_transform()
        axes.plot(
            *place, arrow, color=colour, markersize=6, transform=transform, clip_on=False, zorder=5
        )
        axes.annotate(
            " to ".join(texts),
            place,
            xycoords=transform,
            xytext=offset,
            textcoords="offset points",
            ha=("right" if above else "left") if axis == "x" else "center",
            va="center" if axis == "x" else ("top" if above else "bottom"),
            fontsize=7.5,
        )
    if beyond:
        label = axes.xaxis.label if axis == "x" else axes.yaxis.label
        label.set_text(f"{label.get_text()}\n(arrow: beyond the axis)")


def png(figure: Figure) -> bytes:
    """Return the figure as PNG with a palette: a quarter of the bytes, no visible difference."""
    full, small = io.BytesIO(), io.BytesIO()
    with drawing():
        figure.savefig(full, format="png", dpi=DPI)
    with Image.open(full) as image:
        in_palette = image.convert("RGB").quantize(PNG_COLOURS, dither=Image.Dither.NONE)
    in_palette.save(small, "PNG", optimize=True)
    return small.getvalue()
