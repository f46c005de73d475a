"""Figures as SVG elements that follow the colours of the page."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from html import escape

from matplotlib.figure import Figure

from megapoly.study.figure_style import GRID, INK, MUTED, PAPER, STYLES, drawing

# Of 255; darker lines are hard to see on the dark page.
_LEAST_LUMA = 95
_SERIES = {name: f"--series-{name.replace('_', '-')}" for name in STYLES}
_VARIABLES = {
    INK: "--ink",
    "#000000": "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    PAPER: "--paper",
    **{STYLES[name].light: variable for name, variable in _SERIES.items()},
}


def svg(figure: Figure, name: str, description: str) -> str:
    """Return the figure as an element of a page, with the page's colours.

    Args:
        figure: drawn.
        name: prefix of its ids, which are numbered in the order in which they appear: the same
            figure is the same text.
        description: text alternative.
    """
    buffer = io.StringIO()
    with drawing():
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = _with_own_ids(text.replace("xlink:href", "href"), name)
    text = re.sub(r"<[^>]+>", _follow_page, text)
    head = re.compile(r"<svg [^>]*?viewBox=\"([^\"]+)\"[^>]*>", re.DOTALL)
    label = escape(description)
    return head.sub(
        lambda match: f'<svg viewBox="{match[1]}" role="img" aria-label="{label}">', text, count=1
    )


def colour_variables() -> tuple[dict[str, str], dict[str, str]]:
    """Return the colours of the activations as variables of the page, on light and on dark."""
    light = {variable: STYLES[name].light for name, variable in _SERIES.items()}
    dark = {variable: STYLES[name].dark for name, variable in _SERIES.items()}
    return light, dark


def lifted_variables(drawings: Iterable[str]) -> dict[str, str]:
    """Return variables that replace other colours which are too dark for a dark ground."""
    found = {match for text in drawings for match in re.findall(r"--dim-([0-9a-f]{6})", text)}
    return {f"--dim-{colour}": _lifted(f"#{colour}") for colour in sorted(found)}


def _with_own_ids(text: str, name: str) -> str:
    """Number the ids that something refers to, and drop the others."""
    used = dict.fromkeys(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    own = {old: f"{name}-{number}" for number, old in enumerate(used, start=1)}
    text = re.sub(
        r' id="([^"]+)"', lambda match: f' id="{own[match[1]]}"' if match[1] in own else "", text
    )
    return re.sub(r'(href="#|url\(#)([^")]+)', lambda match: match[1] + own[match[2]], text)


def _follow_page(tag: re.Match[str]) -> str:
    """Return a tag with colours as variables, the page's font, and coordinates to 0.01 point.

    Text that is not in the ink colour does not change: its background is coloured.
    """
    is_text = tag.group().startswith(("<text", "<tspan"))

    def variable(match: re.Match[str]) -> str:
        found = match.group()
        stays = is_text and (found == PAPER or found not in _VARIABLES)
        return found if stays else _variable(found)

    text = re.sub(r"#[0-9a-f]{6}\b(?=[;\"])", variable, tag.group())
    text = re.sub(r"(\d\.\d\d)\d+", r"\1", text)
    return re.sub(r"font: ([^;\"']*?px) '[^\";]*", r"font-size: \1", text)


def _variable(found: str) -> str:
    if found in _VARIABLES:
        return f"var({_VARIABLES[found]})"
    return f"var(--dim-{found[1:]}, {found})" if _lifted(found) != found else found


def _lifted(found: str) -> str:
    """Return the colour, mixed with as much white as a dark ground requires."""
    channels = [int(found[i : i + 2], 16) for i in (1, 3, 5)]
    for white in range(0, 101, 5):
        mixed = [round(c + (255 - c) * white / 100) for c in channels]
        if 0.2126 * mixed[0] + 0.7152 * mixed[1] + 0.0722 * mixed[2] >= _LEAST_LUMA:
            break
    return f"#{mixed[0]:02x}{mixed[1]:02x}{mixed[2]:02x}"
