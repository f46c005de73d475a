"""How figures look: one palette for paper and screen, and SVG that follows the page's colours."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from megapoly.activations import registry
from megapoly.config.schema import ModelConfig
from megapoly.study.report.groups import Entry

# Inches; 413 CSS pixels, so that letters stay readable on a phone of 360.
WIDTH = 4.3
DPI = 160
PALETTE = 128  # colours of a PNG
LINE = 1.4
# Rows of a legend take so much, in inches.
_LEGEND_ROW = 0.17
INK, MUTED, GRID, PAPER = "#1d1d21", "#6c6c75", "#e6e6ea", "#ffffff"
# By place in the registry; the page has a lighter one of each for a dark ground.
_PALETTE = (
    "#8a5a2b",
    "#a57a58",
    "#2f7d4f",
    "#6b9440",
    "#3b6fb6",
    "#3690b5",
    "#b97c15",
    "#9c8a20",
    "#b3273f",
    "#cf6a8a",
    "#7a4fa3",
)
_DARK = (
    "#c89a6a",
    "#d8b899",
    "#63bd88",
    "#a9cf7c",
    "#7fa8e6",
    "#7fcbe8",
    "#f0b45a",
    "#ecd07a",
    "#f2738a",
    "#f0a0b8",
    "#b994e0",
)
_DASHES = ((1.0, 0.0), (5.0, 2.0), (1.5, 1.5), (6.0, 2.0, 1.5, 2.0), (4.0, 1.5, 1.0, 1.5, 1.0, 1.5))
_SETTINGS = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.0,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "megapoly",
}
# Of 255; darker lines are hard to see on the dark page.
_LEAST_LUMA = 95
# What figures of other packages are drawn in, by what the page makes of it.
_VARIABLES = {
    INK: "--ink",
    "#000000": "--ink",
    MUTED: "--muted",
    "#777777": "--muted",
    "#808080": "--muted",
    GRID: "--grid",
    "#e5e5e5": "--grid",
    "#b0b0b0": "--grid",
    "#cccccc": "--grid",
    PAPER: "--paper",
}


@contextmanager
def drawing() -> Iterator[None]:
    """Matplotlib's settings while a figure is made or saved."""
    with rc_context(_SETTINGS):
        yield


def panels(heights: Sequence[float]) -> tuple[Figure, list[Axes]]:
    """A figure of panels above each other, of these heights in inches."""
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained", facecolor=PAPER)
    axes = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(color=GRID, linewidth=0.7)
        panel.set_axisbelow(True)
        panel.set_facecolor("none")
    return figure, list(axes)


def legend(figure: Figure, axes: Axes) -> None:
    """The lines of a panel by name, above all panels, in as many columns as fit."""
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
        fontsize=8.5,
        handlelength=1.6,
        columnspacing=1.2,
        borderaxespad=0.2,
    )


def colour(entry: Entry) -> str:
    """Of an activation, the same in every figure."""
    return _PALETTE[list(registry.ACTIVATIONS).index(entry.activation) % len(_PALETTE)]


def dashes(entries: Sequence[Entry]) -> dict[str, tuple[float, tuple[float, ...] | None]]:
    """Line styles by label: they tell entries of one activation apart, the usual one is solid."""
    counts: dict[str, int] = {}
    styles: dict[str, tuple[float, tuple[float, ...] | None]] = {}
    for entry in entries:
        number = 0
        if not (entry.plain and entry.order in (None, ModelConfig.activation_order)):
            number = counts[entry.activation] = counts.get(entry.activation, 0) + 1
        pattern = _DASHES[number % len(_DASHES)]
        styles[entry.label] = (0.0, pattern if number % len(_DASHES) else None)
    return styles


def png(figure: Figure) -> bytes:
    """The figure on white, in a palette: a quarter of the bytes, and nothing that is seen."""
    full, small = io.BytesIO(), io.BytesIO()
    with drawing():
        figure.savefig(full, format="png", dpi=DPI)
    with Image.open(full) as image:
        in_palette = image.convert("RGB").quantize(PALETTE, dither=Image.Dither.NONE)
    in_palette.save(small, "PNG", optimize=True)
    return small.getvalue()


def svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an element of a page: colours by the page's variables, ids of its own.

    Args:
        figure: drawn.
        name: begins its ids.
        description: for who cannot see it.
    """
    buffer = io.StringIO()
    with drawing():
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{name}-", text)
    text = text.replace("xlink:href", "href")
    text = re.sub(r"<[^>]+>", _follow, text)
    head = re.compile(r"<svg [^>]*?viewBox=\"([^\"]+)\"[^>]*>", re.DOTALL)
    label = description.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return head.sub(rf'<svg viewBox="\1" role="img" aria-label="{label}">', text, count=1)


def colour_variables() -> tuple[dict[str, str], dict[str, str]]:
    """The palette as variables of the page, on light and on dark ground."""
    names = [f"--series-{i}" for i in range(len(_PALETTE))]
    light, dark = (zip(names, colours, strict=True) for colours in (_PALETTE, _DARK))
    return dict(light), dict(dark)


def _follow(tag: re.Match[str]) -> str:
    """A tag with colours by variables, the page's letters, and hundredths of a point.

    Text that is not in the ink stays as it is: it stands on something coloured.
    """
    is_text = tag.group().startswith(("<text", "<tspan"))

    def variable(match: re.Match[str]) -> str:
        found = match.group()
        stays = is_text and (found == PAPER or found not in (*_VARIABLES, *_PALETTE))
        return found if stays else _variable(found)

    text = re.sub(r"#[0-9a-f]{6}\b(?=[;\"])", variable, tag.group())
    text = re.sub(r"(\d\.\d\d)\d+", r"\1", text)
    return re.sub(r"font: ([^;\"']*?px) '[^\";]*", r"font-size: \1", text)


def _variable(found: str) -> str:
    if found in _VARIABLES:
        return f"var({_VARIABLES[found]})"
    if found in _PALETTE:
        return f"var(--series-{_PALETTE.index(found)})"
    return f"var(--dim-{found[1:]}, {found})" if _lifted(found) != found else found


def lifted_variables(drawings: Iterable[str]) -> dict[str, str]:
    """Other packages' colours that are too dark for a dark ground, with what replaces them."""
    found = {match for text in drawings for match in re.findall(r"--dim-([0-9a-f]{6})", text)}
    return {f"--dim-{colour}": _lifted(f"#{colour}") for colour in sorted(found)}


def _lifted(found: str) -> str:
    """The colour, mixed with as much white as it needs."""
    channels = [int(found[i : i + 2], 16) for i in (1, 3, 5)]
    for white in range(0, 101, 5):
        mixed = [round(c + (255 - c) * white / 100) for c in channels]
        if 0.2126 * mixed[0] + 0.7152 * mixed[1] + 0.0722 * mixed[2] >= _LEAST_LUMA:
            break
    return f"#{mixed[0]:02x}{mixed[1]:02x}{mixed[2]:02x}"
