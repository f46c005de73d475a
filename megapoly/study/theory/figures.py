"""One figure for each statement that ``megapoly theory`` measures; needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D

Report = dict[str, Any]
Results = Sequence[dict[str, Any]]

# Told apart by the colour-blind as well; read on white.
COLOURS = ("#4477aa", "#cc5533", "#228833", "#8844aa")
GREY = "#777777"
# Inches; at 160 dpi 800 pixels, which a phone shows without zooming.
WIDTH = 5.0


def draw_all(report: Report) -> dict[str, Figure]:
    """The figures, by the name of the file."""
    return {
        "theorem_1": _theorem_1(report["theorem_1"]),
        "lemma_a4": _lemma_a4(report["lemma_a4"]),
        "lemma_2": _imitations(
            report["lemma_2"],
            report["fits"]["lemma_2"],
            "Lemma 2: a ReLU network for one PolyReLU unit",
        ),
        "theorem_2": _imitations(
            report["theorem_2"],
            report["fits"]["theorem_2"],
            "Theorem 2: a ReLU network for a PolyReLU network",
        ),
        "theorem_3": _theorem_3(report["theorem_3"], report["fits"]["theorem_3"]),
    }


def _panels(heights: Sequence[float], title: str) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained", facecolor="white")
    panels = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)
    for axes in panels[:, 0]:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e5e5e5", linewidth=0.6)
        axes.set_axisbelow(True)
    figure.supxlabel("megapoly theory --output FOLDER", fontsize=7, color=GREY)
    figure.suptitle(title, x=0.02, ha="left", fontsize=11, fontweight="bold")
    return figure, list(panels[:, 0])


def _theorem_1(results: Results) -> Figure:
    figure, (curve, bars) = _panels((2.6, 2.2), "Theorem 1: a ReLU network is a PolyReLU network")
    drawn = next(r for r in results if "x" in r)
    curve.plot(drawn["x"], drawn["f"], color=COLOURS[0], linewidth=5, alpha=0.4, label="ReLU, f")
    curve.plot(drawn["x"], drawn["g"], color="black", linewidth=1, label="PolyReLU, g")
    curve.set_xlabel("input x")
    curve.set_ylabel("output")
    curve.set_title(
        f"{drawn['architecture']}: largest |f - g| = {drawn['largest_difference']:g}",
        fontsize=10,
        loc="left",
    )
    curve.legend(frameon=False)
    order = max(r["order"] for r in results)
    shown = [r for r in results if r["order"] == order]
    rows = range(len(shown))
    names = [f"{r['architecture']}\n|f - g| = {r['largest_difference']:g}" for r in shown]
    for key, label, shift, colour in (
        ("relu_parameters", "ReLU", -0.2, COLOURS[0]),
        ("polyrelu_parameters", f"PolyReLU, order {order}", 0.2, "black"),
    ):
        drawn_bars = bars.barh(
            [row + shift for row in rows],
            [r[key] for r in shown],
            height=0.38,
            color=colour,
            label=label,
        )
        bars.bar_label(drawn_bars, padding=3, fontsize=9)
    bars.set_yticks(rows, names)
    bars.invert_yaxis()
    bars.margins(x=0.15)
    bars.set_xlabel("parameters")
    bars.legend(frameon=False, fontsize=8)
    return figure


def _lemma_a4(results: Results) -> Figure:
    orders = sorted({r["order"] for r in results})
    figure, panels = _panels([2.7] * len(orders), "Lemma A.4: $x^n$ exactly, by PolyReLU units")
    for axes, order, colour in zip(panels, orders, COLOURS, strict=False):
        shown = [r for r in results if r["order"] == order]
        n = [r["n"] for r in shown]
        axes.plot(n, [r["units"] for r in shown], ".", color=colour, label="built")
        axes.step(
            n,
            [r["most_units"] for r in shown],
            where="post",
            color=colour,
            linewidth=1,
            label=r"$8\lfloor\log_r n\rfloor + 4$, products counted",
        )
        axes.step(
            n,
            [2 * r["paper_polynomial_units"] for r in shown],
            where="post",
            color=GREY,
            linestyle="--",
            linewidth=1,
            label=r"paper's $O(\ln^2 n)$: 2 $\sum (i + 1)$, no products",
        )
        exact = all(r["exact"] for r in shown)
        axes.set_title(
            f"order r = {order}; {'equal' if exact else 'NOT equal'} in rational arithmetic, "
            f"{len(shown)} exponents",
            fontsize=10,
            loc="left",
        )
        axes.set_xscale("log", base=2)
        axes.set_xlabel("exponent n")
        axes.set_ylabel("units")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=8)
    return figure


def _imitations(results: Results, lines: Report, title: str) -> Figure:
    figure, (sizes, errors) = _panels((3.0, 2.6), title)
    for (group, members), colour in zip(
        groupby(results, key=lambda r: r["group"]), COLOURS, strict=False
    ):
        shown = list(members)
        eps = [r["eps"] for r in shown]
        line = lines[group]
        sizes.plot(
            eps,
            [r["parameters"] for r in shown],
            "o",
            color=colour,
            markersize=4,
            label=f"{group}: {line['c_0']:.0f} + {line['c_1']:.0f} ln(1/eps)",
        )
        fit = [line["c_0"] - line["c_1"] * math.log(e) for e in eps]
        sizes.plot(eps, fit, color=colour, linewidth=1)
        errors.plot(eps, [r["error"] for r in shown], "o-", color=colour, markersize=4, label=group)
    middle = shown[len(shown) // 2]
    squared = [middle["parameters_by_log_squared"] * math.log(e) ** 2 for e in eps]
    sizes.plot(eps, squared, "--", color=GREY, linewidth=1, label="like ln$^2$(1/eps)")
    sizes.set_ylabel("parameters")
    sizes.set_ylim(bottom=0)
    errors.plot(eps, eps, "--", color=GREY, linewidth=1, label="allowed")
    errors.set_yscale("log")
    errors.set_ylabel("largest error measured")
    for axes in (sizes, errors):
        axes.set_xscale("log")
        axes.invert_xaxis()
        axes.set_xlabel("error allowed, eps")
        axes.legend(frameon=False, fontsize=8)
    return figure


def _theorem_3(results: Results, slopes: Results) -> Figure:
    dimensions = sorted({r["d"] for r in results})
    figure, panels = _panels([3.6] * len(dimensions), "Theorem 3: smooth functions, error and size")
    for axes, d in zip(panels, dimensions, strict=True):
        key = lambda r: (r["n"], r["kind"])  # noqa: E731
        shown = sorted((r for r in results if r["d"] == d), key=key)
        for (n, kind), members in groupby(shown, key=key):
            _error_line(axes, list(members), d, n, kind, slopes)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("parameters")
        axes.set_ylabel("sup error on a grid")
        bottom, top = axes.get_ylim()
        axes.set_ylim(bottom=bottom * (bottom / top) ** 0.15)  # room for the legend
        axes.set_title(f"d = {d}", fontsize=10, loc="left")
        axes.legend(frameon=False, fontsize=8, loc="lower left")
    kinds = [
        Line2D([], [], color="black", marker="o", markersize=4, label="PolyReLU"),
        Line2D([], [], color="black", marker="s", fillstyle="none", ls="--", label="ReLU"),
        Line2D([], [], color=GREY, linestyle=":", label="slope -n/d"),
    ]
    labels = [str(kind.get_label()) for kind in kinds]
    # A second legend, beside that of the axes.
    panels[-1].add_artist(
        Legend(panels[-1], kinds, labels, loc="upper right", frameon=False, fontsize=8)
    )
    return figure


def _error_line(axes: Axes, shown: Results, d: int, n: int, kind: str, slopes: Results) -> None:
    found = {(r["d"], r["n"], r["kind"]): r["slope"] for r in slopes}
    size, error = [r["parameters"] for r in shown], [r["error"] for r in shown]
    if kind == "ReLU":
        axes.plot(size, error, "s--", color=COLOURS[n - 1], fillstyle="none", markersize=4)
        return
    label = f"n = {n}: slopes {found[d, n, 'PolyReLU']:.2f}, ReLU {found[d, n, 'ReLU']:.2f}"
    axes.plot(size, error, "o-", color=COLOURS[n - 1], markersize=4, label=label)
    reference = [error[-1] * (s / size[-1]) ** (-n / d) for s in size]
    axes.plot(size, reference, ":", color=GREY, linewidth=1)
