"""Figures of one or several analyses that ``megapoly analyze`` wrote; needs matplotlib."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from megapoly.study.analysis.drawing import (
    finish_layers,
    layer_colour,
    legend_of_layers,
    line_styles,
)
from megapoly.study.figure_style import (
    MUTED,
    PAPER,
    STYLES,
    WIDTH,
    drawing,
    legend_below,
    set_title,
)
from megapoly.study.figure_style import (
    panels as make_panels,
)

Analysis = Mapping[str, Any]
Analyses = Sequence[Analysis]

# Weights drawn in one panel, each with its line style, and the title of the panel.
_RANK_PANELS: tuple[tuple[dict[str, str], str], ...] = (
    ({"fc1": "-"}, "FC1 (gated: gate stacked on up)"),
    ({"gate": "-", "up": "--"}, "halves of a gated FC1: gate, up dashed"),
    ({"down": "-"}, "FC2"),
)


def draw_all(analyses: Analyses) -> dict[str, Figure]:
    """Draw all figures, by the name of the file.

    Args:
        analyses: content of analysis.json files. ``label`` names one in legends, else its
            activation does.

    Returns:
        Figures of all analyses together; ``coefficients`` and ``curves`` show one each, with its
        number after the name if there are several. A figure without content is left out: its
        function returns None.
    """
    with drawing():
        drawn: dict[str, Figure | None] = {
            "effective_rank": effective_rank(analyses),
            "similarity": similarity(analyses),
            "expert_similarity": expert_similarity(analyses),
            "power_shares": power_shares(analyses),
            "activation_statistics": activation_statistics(analyses),
        }
        for i, analysis in enumerate(analyses):
            suffix = f"_{i}" if len(analyses) > 1 else ""
            drawn[f"coefficients{suffix}"] = coefficients(analysis)
            drawn[f"curves{suffix}"] = curves(analysis)
    return {name: figure for name, figure in drawn.items() if figure is not None}


def label_of(analysis: Analysis) -> str:
    """Return the name of an analysis in legends."""
    return str(analysis.get("label") or analysis["activation"])


def effective_rank(analyses: Analyses) -> Figure | None:
    """Draw Fig. 6: effective rank of the FFN weights by layer; for experts mean and range."""
    shown = [a for a in analyses if a.get("effective_rank")]
    of_each = [
        [w for w in a["effective_rank"]["weights"] if w["kind"] != "shared_experts"] for a in shown
    ]
    present = {w["weight"] for weights in of_each for w in weights}
    drawn = [(lines, title) for lines, title in _RANK_PANELS if present & set(lines)]
    if not drawn:
        return None
    figure, panels = make_panels([2.3] * len(drawn), "Effective rank of the FFN weights")
    for axes, (lines, title) in zip(panels, drawn, strict=True):
        shapes = [w["shape"] for weights in of_each for w in weights if w["weight"] in lines]
        for a, weights, style in zip(shown, of_each, line_styles(shown), strict=True):
            for i, (name, line) in enumerate(lines.items()):
                chosen = [w for w in weights if w["weight"] == name]
                label = "_" if i else label_of(a)  # one name in the legend
                _by_layer(axes, chosen, _rank_of, label, {**style, "linestyle": line})
        axes.set_title(f"{title}; at most {max(map(min, shapes))}")
        axes.set_ylabel("effective rank")
    finish_layers(figure, panels)
    return figure


def _rank_of(weight: Mapping[str, Any]) -> float:
    return float(weight["effective_rank"])


def similarity(analyses: Analyses) -> Figure | None:
    """Draw Fig. 7: cosine similarity of layers' hidden states, one matrix below the other."""
    shown = [a for a in analyses if a.get("similarity")]
    if not shown:
        return None
    lowest = min(value for a in shown for row in a["similarity"]["matrix"] for value in row)
    figure, panels = make_panels([3.4] * len(shown), "Cosine similarity of states", grid=False)
    for axes, a in zip(panels, shown, strict=True):
        matrix = a["similarity"]["matrix"]
        names = ["emb.", *map(str, range(1, len(matrix)))]
        image = axes.imshow(matrix, vmin=min(lowest, 0.0), vmax=1.0, cmap="viridis")
        axes.spines[:].set_visible(False)
        every = range(0, len(names), max(1, len(names) // 9))
        axes.set_xticks(every, [names[i] for i in every])
        axes.set_yticks(every, [names[i] for i in every])
        if len(matrix) <= 9:
            _write_cells(axes, matrix, min(lowest, 0.0))
        pairs = [v for i, row in enumerate(matrix) for v in row[1:i]]
        mean = f": mean over pairs of layers {statistics.fmean(pairs):.3f}" if pairs else ""
        axes.set_title(f"{label_of(a)}{mean}")
        axes.set_xlabel("after layer")
        axes.set_ylabel("after layer")
        figure.colorbar(image, ax=axes, shrink=0.8)
    return figure


def expert_similarity(analyses: Analyses) -> Figure | None:
    """Draw how similar the states of each expert's tokens are before and after the layer."""
    shown = [a for a in analyses if a.get("similarity") and a["similarity"]["experts"]]
    if not shown:
        return None
    figure, (axes,) = make_panels([3.2], "States before and after a layer, by expert")
    for i, (a, style) in enumerate(zip(shown, line_styles(shown), strict=True)):
        experts = a["similarity"]["experts"]
        shift = 0.12 * (i - (len(shown) - 1) / 2)
        for entry in experts["per_layer"]:
            layer = entry["layer"]
            dots = [row[layer] for row in entry["matrix"] if row is not None]
            axes.plot(
                [layer + 1 + shift] * len(dots), dots, ".", color=style["color"], alpha=0.45, ms=5
            )
        layers = range(1, len(experts["mean"]) + 1)
        mean = [row[j] for j, row in enumerate(experts["mean"])]
        axes.plot(layers, mean, label=f"{label_of(a)}, mean of experts", **style)
    axes.set_ylabel("cosine similarity")
    axes.margins(y=0.1)
    finish_layers(figure, [axes])
    return figure


def coefficients(analysis: Analysis) -> Figure | None:
    """Draw the coefficients through training: a panel for each power, a line for each layer."""
    found = analysis.get("coefficients")
    if not found or not found["series"]:
        return None
    leaves = sorted({tag.rpartition("/")[2] for tag in found["series"]})
    figure, panels = make_panels(
        [1.9] * len(leaves), f"Coefficients through training, {label_of(analysis)}"
    )
    layers = analysis["num_layers"]
    for axes, leaf in zip(panels, leaves, strict=True):
        for tag, values in found["series"].items():
            _, layer, *kind, last = tag.split("/")
            if last != leaf:
                continue
            number = int(layer.rpartition("_")[2])
            axes.plot(
                found["tokens"],
                values,
                color=layer_colour(number, layers),
                linewidth=0.6 if len(kind) > 1 else 1.2,
                linestyle="--" if "shared_experts" in kind else "-",
                label=f"layer {number + 1}",
            )
        axes.set_ylabel(f"$a_{leaf[1:]}$" if leaf.startswith("a") else leaf)
        axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    panels[-1].set_xlabel("tokens")
    legend_of_layers(figure, panels[0], layers)
    return figure


def curves(analysis: Analysis) -> Figure | None:
    """Draw each layer's activation over the pre-activations; the grey area is their density."""
    found = analysis.get("curves")
    if not found:
        return None
    layers = sorted({c["layer"] for c in found})
    rows = -(-len(layers) // 2)
    figure = Figure(figsize=(WIDTH, 0.6 + 1.5 * rows), layout="constrained")
    colour = STYLES[analysis["activation"]].light
    cells = figure.subplots(rows, 2, squeeze=False).flatten()
    for axes, layer in zip(cells, layers, strict=False):
        here = [c for c in found if c["layer"] == layer]
        density = axes.twinx()
        density.set_yticks([])
        density.spines[:].set_visible(False)
        x, mean_density = _mean_density(here)
        density.fill_between(x, mean_density, color=MUTED, alpha=0.3, linewidth=0)
        for c in here:
            axes.plot(
                c["x"],
                c["y"],
                color=colour,
                linestyle="--" if c["kind"] == "shared_experts" else "-",
                linewidth=1.8 if len(here) < 3 else 0.8,
            )
        density.set_ylim(bottom=0, top=3 * density.get_ylim()[1])
        axes.grid(visible=True)
        # Draw the curve over the density, whose axes were made later.
        axes.set_zorder(density.get_zorder() + 1)
        axes.tick_params(labelsize=8)
        axes.set_title(f"layer {layer + 1}", fontsize=9)
    for axes in cells[len(layers) :]:
        axes.set_visible(False)
    figure.supxlabel("pre-activation; grey: density", fontsize=9)
    figure.supylabel("activation", fontsize=9)
    set_title(figure, f"Activations as learned, {label_of(analysis)}")
    return figure


def _mean_density(shown: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean density of a layer's experts, over all their pre-activations."""
    x = np.linspace(min(c["x"][0] for c in shown), max(c["x"][-1] for c in shown), 160)
    each = [np.interp(x, c["x"], c["density"], left=0.0, right=0.0) for c in shown]
    return x, np.mean(each, axis=0)


def power_shares(analyses: Analyses) -> Figure | None:
    """Draw the share of each power in the output by layer; for experts the mean.

    Bars have the colour of the activation, the darker the higher the power.
    """
    shown = [a for a in analyses if a.get("power_shares")]
    if not shown:
        return None
    figure, panels = make_panels(
        [2.4] * len(shown), "Shares of the powers in the output", grid=False
    )
    for axes, a in zip(panels, shown, strict=True):
        entries = [e for e in a["power_shares"] if e["kind"] != "shared_experts"]
        layers = sorted({e["layer"] for e in entries})
        bottom = [0.0] * len(layers)
        for i in range(len(entries[0]["shares"])):
            heights = [
                statistics.fmean(e["shares"][i] for e in entries if e["layer"] == layer)
                for layer in layers
            ]
            axes.bar(
                [layer + 1 for layer in layers],
                heights,
                bottom=bottom,
                **_bar_of_power(i, STYLES[a["activation"]].light),
            )
            bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
        axes.set_ylim(0, 1)
        axes.set_ylabel("share of mean square")
        axes.set_title(label_of(a))
    finish_layers(figure, panels)
    order = max(len(e["shares"]) for a in shown for e in a["power_shares"]) - 1
    names = ("constant", "$x$", "$x^2$", "$x^3$", "$x^4$")[: order + 1]
    legend_below(figure, {n: Patch(**_bar_of_power(i, MUTED)) for i, n in enumerate(names)})
    return figure


def _bar_of_power(power: int, colour: str) -> dict[str, Any]:
    """Return the style of a bar; opacity works on light and on dark ground."""
    opacity = (0.1, 0.3, 0.55, 0.8, 1.0)[power]
    return {"facecolor": to_rgba(colour, opacity), "edgecolor": PAPER, "linewidth": 0.8}


def activation_statistics(analyses: Analyses) -> Figure | None:
    """Draw saturation and outliers by layer; for experts the mean and the range."""
    shown = [a for a in analyses if a.get("activations")]
    if not shown:
        return None
    measures: list[tuple[str, Callable[[Any], float], Any]] = [
        ("kurtosis of the input of FC2 (normal: 3)", lambda e: e["after"]["kurtosis"], None),
        ("largest / RMS in a token's row", lambda e: e["after"]["max_over_rms"], "{x:g}"),
        (
            "share within 0.01 RMS of zero",
            lambda e: e["after"]["near_zero"],
            ticker.PercentFormatter(1.0),
        ),
        (
            "pre-activations where the curve is flat",
            lambda e: e["flat"],
            ticker.PercentFormatter(1.0),
        ),
    ]
    figure, panels = make_panels([2.0] * len(measures), "Outliers and saturation of activations")
    for axes, (title, value, form) in zip(panels, measures, strict=True):
        for a, style in zip(shown, line_styles(shown), strict=True):
            entries = [e for e in a["activations"] if e["kind"] != "shared_experts"]
            _by_layer(axes, entries, value, label_of(a), style)
        axes.set_title(title)
        if form is None:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_locator(ticker.NullLocator())
        else:
            axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
            axes.yaxis.set_major_formatter(form)
    finish_layers(figure, panels)
    return figure


def _by_layer(
    axes: Axes,
    entries: Sequence[Mapping[str, Any]],
    value: Callable[[Any], float],
    label: str,
    style: dict[str, Any],
) -> None:
    """Draw the mean of each layer's entries as a line and their range as a band."""
    by_layer: dict[int, list[float]] = {}
    for entry in entries:
        by_layer.setdefault(entry["layer"], []).append(value(entry))
    layers = [layer + 1 for layer in sorted(by_layer)]
    values = [by_layer[layer - 1] for layer in layers]
    if max(map(len, values), default=1) > 1:
        axes.fill_between(
            layers, [*map(min, values)], [*map(max, values)], color=style["color"], alpha=0.15, lw=0
        )
    axes.plot(layers, [*map(statistics.fmean, values)], label=label, **style)


def _write_cells(axes: Axes, matrix: Sequence[Sequence[float]], lowest: float) -> None:
    middle = lowest + 0.6 * (1.0 - lowest)
    for i, row in enumerate(matrix):
        for j, value in enumerate(row):
            # Not black itself: on a dark ground the page makes black text light, which hides it.
            colour = "#1a1a1a" if value > middle else "white"
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=8)
