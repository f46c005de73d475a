"""What the figures share: panels below each other, colours, legends; needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Told apart by the colour-blind as well, together with the markers; read on white.
COLOURS = ("#4477aa", "#cc5533", "#228833", "#8844aa", "#bb8800", "#33a0b8", "#777777")
MARKERS = "osD^vP*"
GREY = "#777777"
# Inches; at 160 dpi 800 pixels, which a phone shows without zooming.
WIDTH = 5.0


def panels_of(
    heights: Sequence[float], title: str, *, grid: bool = True
) -> tuple[Figure, list[Axes]]:
    """A figure with a title and panels of these heights in inches, below each other."""
    figure = Figure(figsize=(WIDTH, 0.5 + sum(heights)), layout="constrained", facecolor="white")
    panels = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)
    for axes in panels[:, 0]:
        make_plain(axes, grid=grid)
    set_title(figure, title)
    return figure, list(panels[:, 0])


def set_title(figure: Figure, title: str) -> None:
    """Put a title above everything, at the left."""
    figure.suptitle(title, x=0.02, ha="left", fontsize=11, fontweight="bold")


def make_plain(axes: Axes, *, grid: bool = True) -> None:
    """Two spines, and a light grid behind what is drawn."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    if grid:
        axes.grid(color="#e5e5e5", linewidth=0.6)


def finish_layers(figure: Figure, panels: Sequence[Axes]) -> None:
    """Name the axis of layers, and what several lines are."""
    panels[-1].set_xlabel("layer")
    for axes in panels:
        axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    names: dict[str, Any] = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        names |= dict(zip(labels, handles, strict=True))
    legend_below(figure, names)


def legend_below(figure: Figure, names: Mapping[str, Any]) -> None:
    """Name several lines below the figure, where they hide nothing; of one there is no need."""
    if len(names) > 1:
        figure.legend(
            list(names.values()),
            list(names),
            frameon=False,
            fontsize=9,
            ncols=min(len(names), 4 if max(map(len, names)) < 14 else 2),
            loc="outside lower center",
        )


def styles(count: int) -> list[dict[str, Any]]:
    """Colour and marker of each of so many lines."""
    return [
        {
            "color": COLOURS[i % len(COLOURS)],
            "marker": MARKERS[i % len(MARKERS)],
            "markersize": 4,
            "linewidth": 1.4,
        }
        for i in range(count)
    ]


def layer_colour(layer: int, num_layers: int) -> Any:
    """From dark to light with depth."""
    # Not the whole map: its end is too light for a line on white.
    return matplotlib.colormaps["viridis"](0.88 * layer / max(num_layers - 1, 1))


def legend_of_layers(figure: Figure, axes: Axes, num_layers: int) -> None:
    """First, middle and last of many layers, each once."""
    named = {f"layer {i + 1}" for i in range(num_layers)}
    if num_layers > 6:
        named = {f"layer {i + 1}" for i in (0, num_layers // 2, num_layers - 1)}
    handles, labels = axes.get_legend_handles_labels()
    chosen = {name: handle for handle, name in zip(handles, labels, strict=True) if name in named}
    ordered = sorted(chosen, key=lambda name: int(name.rpartition(" ")[2]))
    legend_below(figure, {name: chosen[name] for name in ordered})
