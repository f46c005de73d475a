"""A figure for each statement that ``megapoly theory`` measures; needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D

from megapoly.study.figure_style import MUTED, STYLES, drawing, panels
from megapoly.study.theory.measure import ONE_LAYER

Report = dict[str, Any]
Results = Sequence[dict[str, Any]]

RELU, POLYRELU = STYLES["relu"].light, STYLES["polyrelu"].light
# Orders, depths and numbers of derivatives.
_MARKERS = "os^D"


def draw_all(report: Report) -> dict[str, Figure]:
    """Draw all figures, by the name of the file."""
    return {name: draw(report, name) for name in _STATEMENTS}


def draw(report: Report, name: str) -> Figure:
    """Draw the figure of one statement."""
    with drawing():
        return _STATEMENTS[name](report)


def _panels(heights: Sequence[float], title: str) -> tuple[Figure, list[Axes]]:
    figure, axes = panels(heights, title)
    figure.supxlabel("megapoly theory --output FOLDER", fontsize=7, color=MUTED)
    return figure, axes


def _theorem_1(results: Results) -> Figure:
    figure, (curve, bars) = _panels((2.6, 2.2), "Theorem 1: a ReLU network is a PolyReLU network")
    drawn = next(r for r in results if "x" in r)
    curve.plot(drawn["x"], drawn["f"], color=RELU, linewidth=5, alpha=0.4, label="ReLU, f")
    curve.plot(drawn["x"], drawn["g"], color=POLYRELU, linewidth=1.2, label="PolyReLU, g")
    curve.set_xlabel("input x")
    curve.set_ylabel("output")
    curve.set_title(
        f"{drawn['architecture']}: largest |f - g| = {drawn['largest_difference']:g}",
    )
    curve.legend()
    order = max(r["order"] for r in results)
    shown = [r for r in results if r["order"] == order]
    rows = range(len(shown))
    names = [f"{r['architecture']}\n|f - g| = {r['largest_difference']:g}" for r in shown]
    for key, label, shift, colour in (
        ("relu_parameters", "ReLU", -0.2, RELU),
        ("polyrelu_parameters", f"PolyReLU, order {order}", 0.2, POLYRELU),
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
    bars.legend()
    return figure


def _lemma_a4(results: Results) -> Figure:
    orders = sorted({r["order"] for r in results})
    figure, axes_list = _panels([2.7] * len(orders), "Lemma A.4: $x^n$ exactly, by PolyReLU units")
    for axes, order in zip(axes_list, orders, strict=True):
        shown = [r for r in results if r["order"] == order]
        n = [r["n"] for r in shown]
        axes.plot(n, [r["units"] for r in shown], ".", color=POLYRELU, label="built")
        axes.step(
            n,
            [r["most_units"] for r in shown],
            where="post",
            color=POLYRELU,
            linewidth=1,
            label=r"$8\lfloor\log_r n\rfloor + 4$, products counted",
        )
        axes.step(
            n,
            [2 * r["paper_polynomial_units"] for r in shown],
            where="post",
            color=MUTED,
            linestyle="--",
            linewidth=1,
            label=r"paper's $O(\ln^2 n)$: 2 $\sum (i + 1)$, no products",
        )
        exact = all(r["exact"] for r in shown)
        axes.set_title(
            f"order r = {order}; {'equal' if exact else 'NOT equal'} in rational arithmetic, "
            f"{len(shown)} exponents",
        )
        axes.set_xscale("log", base=2)
        axes.set_xlabel("exponent n")
        axes.set_ylabel("units")
        axes.set_ylim(bottom=0)
        axes.legend()
    return figure


def _imitations(results: Results, lines: Report, title: str) -> Figure:
    figure, (sizes, errors) = _panels((3.0, 2.6), title)
    for (group, members), marker in zip(
        groupby(results, key=lambda r: r["group"]), _MARKERS, strict=False
    ):
        shown = list(members)
        eps = [r["eps"] for r in shown]
        line = lines[group]
        sizes.plot(
            eps,
            [r["parameters"] for r in shown],
            marker,
            color=RELU,
            markersize=4,
            label=f"{group}: {line['c_0']:.0f} + {line['c_1']:.0f} ln(1/eps)",
        )
        fit = [line["c_0"] - line["c_1"] * math.log(e) for e in eps]
        sizes.plot(eps, fit, color=RELU, linewidth=1)
        errors.plot(
            eps,
            [r["error"] for r in shown],
            f"{marker}-",
            color=RELU,
            markersize=4,
            label=group,
        )
    middle = shown[len(shown) // 2]
    squared = [middle["parameters_by_log_squared"] * math.log(e) ** 2 for e in eps]
    sizes.plot(eps, squared, "--", color=MUTED, linewidth=1, label="like ln$^2$(1/eps)")
    sizes.set_ylabel("parameters")
    sizes.set_ylim(bottom=0)
    errors.plot(eps, eps, "--", color=MUTED, linewidth=1, label="allowed")
    errors.set_yscale("log")
    errors.set_ylabel("largest error measured")
    for axes in (sizes, errors):
        axes.set_xscale("log")
        axes.invert_xaxis()
        axes.set_xlabel("error allowed, eps")
        axes.legend()
    return figure


def _theorem_3(results: Results, slopes: Results) -> Figure:
    taylor = [r for r in results if r["kind"] not in ONE_LAYER]
    dimensions = sorted({r["d"] for r in taylor})
    figure, axes_list = _panels(
        [3.6] * (len(dimensions) + 1), "Theorem 3: smooth functions, error and size"
    )
    _one_layer(axes_list.pop(), results, slopes)
    for axes, d in zip(axes_list, dimensions, strict=True):
        shown = sorted((r for r in taylor if r["d"] == d), key=_line_of)
        for (n, kind), members in groupby(shown, key=_line_of):
            _error_line(axes, list(members), d, n, kind, slopes)
        _finish(axes, f"d = {d}, local Taylor polynomials")
    kinds = [
        Line2D([], [], color=POLYRELU, label="PolyReLU"),
        Line2D([], [], color=RELU, ls="--", label="ReLU"),
        Line2D([], [], color=MUTED, linestyle=":", label="slope -n/d"),
    ]
    labels = [str(kind.get_label()) for kind in kinds]
    # A second legend: legend() would replace the first one.
    axes_list[-1].add_artist(Legend(axes_list[-1], kinds, labels, loc="upper right"))
    return figure


def _line_of(result: dict[str, Any]) -> tuple[int, str]:
    return result["n"], result["kind"]


def _one_layer(axes: Axes, results: Results, slopes: Results) -> None:
    """Draw the splines of one hidden layer beside the local Taylor polynomials of highest n."""
    found = {(r["d"], r["n"], r["kind"]): r["slope"] for r in slopes}
    of_one = sorted((r for r in results if r["d"] == 1), key=_line_of)
    of_one.sort(key=lambda r: r["kind"] not in ONE_LAYER)
    most = max(r["n"] for r in of_one)
    for (n, kind), members in groupby(of_one, key=_line_of):
        shown = list(members)
        size, error = [r["parameters"] for r in shown], [r["error"] for r in shown]
        colour = POLYRELU if kind.startswith("PolyReLU") else RELU
        label = f"{kind}, n = {n}: slope {found[1, n, kind]:.2f}"
        if kind in ONE_LAYER:
            style = "-" if colour == POLYRELU else "--"
            axes.plot(size, error, _MARKERS[n - 1] + style, color=colour, markersize=4, label=label)
        elif n == most:
            label = f"{kind}, Taylor, n = {n}"
            axes.plot(size, error, ":", color=colour, linewidth=1.5, label=label)
    _finish(axes, "d = 1, splines in one hidden layer", room=0.75)


def _finish(axes: Axes, title: str, room: float = 0.15) -> None:
    """Set scales and labels; leave room for the legend, as a share of the range of the errors."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("parameters")
    axes.set_ylabel("sup error on a grid")
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom=bottom * (bottom / top) ** room)
    axes.set_title(title)
    axes.legend(loc="lower left")


def _error_line(axes: Axes, shown: Results, d: int, n: int, kind: str, slopes: Results) -> None:
    found = {(r["d"], r["n"], r["kind"]): r["slope"] for r in slopes}
    size, error = [r["parameters"] for r in shown], [r["error"] for r in shown]
    marker = _MARKERS[n - 1]
    if kind == "ReLU":
        axes.plot(size, error, f"{marker}--", color=RELU, fillstyle="none", markersize=4)
        return
    label = f"n = {n}: slopes {found[d, n, 'PolyReLU']:.2f}, ReLU {found[d, n, 'ReLU']:.2f}"
    axes.plot(size, error, f"{marker}-", color=POLYRELU, markersize=4, label=label)
    reference = [error[-1] * (s / size[-1]) ** (-n / d) for s in size]
    axes.plot(size, reference, ":", color=MUTED, linewidth=1)


_STATEMENTS: dict[str, Callable[[Report], Figure]] = {
    "theorem_1": lambda report: _theorem_1(report["theorem_1"]),
    "lemma_a4": lambda report: _lemma_a4(report["lemma_a4"]),
    "lemma_2": lambda report: _imitations(
        report["lemma_2"],
        report["fits"]["lemma_2"],
        "Lemma 2: a ReLU network for one PolyReLU unit",
    ),
    "theorem_2": lambda report: _imitations(
        report["theorem_2"],
        report["fits"]["theorem_2"],
        "Theorem 2: a ReLU network for a PolyReLU network",
    ),
    "theorem_3": lambda report: _theorem_3(report["theorem_3"], report["fits"]["theorem_3"]),
}
