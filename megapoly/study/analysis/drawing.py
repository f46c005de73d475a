"""Lines and legends of layers that the figures of analyses share; needs matplotlib."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megapoly.study.figure_style import activation_line, legend_below


def line_styles(analyses: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the style of each analysis's line: colour and marker of its activation."""
    seen: Counter[str] = Counter()
    styles = []
    for analysis in analyses:
        activation = analysis["activation"]
        styles.append(activation_line(activation, seen[activation]))
        seen[activation] += 1
    return styles


def finish_layers(figure: Figure, panels: Sequence[Axes]) -> None:
    """Label the axis of layers and add a legend of the lines."""
    panels[-1].set_xlabel("layer")
    for axes in panels:
        axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    names: dict[str, Any] = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        names |= dict(zip(labels, handles, strict=True))
    legend_below(figure, names)


def layer_colour(layer: int, num_layers: int) -> Any:
    """Return the colour of a layer, from dark to light with depth."""
    # Not the whole map: its end is too light for a line on white.
    return matplotlib.colormaps["viridis"](0.88 * layer / max(num_layers - 1, 1))


def legend_of_layers(figure: Figure, axes: Axes, num_layers: int) -> None:
    """Add a legend of the layers; of more than six the first, the middle and the last."""
    named = {f"layer {i + 1}" for i in range(num_layers)}
    if num_layers > 6:
        named = {f"layer {i + 1}" for i in (0, num_layers // 2, num_layers - 1)}
    handles, labels = axes.get_legend_handles_labels()
    chosen = {name: handle for handle, name in zip(handles, labels, strict=True) if name in named}
    ordered = sorted(chosen, key=lambda name: int(name.rpartition(" ")[2]))
    legend_below(figure, {name: chosen[name] for name in ordered})
