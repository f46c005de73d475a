"""Colours, markers and dashes of the models that a report compares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megapoly.config.schema import ModelConfig
from megapoly.study.figure_style import STYLES
from megapoly.study.report.groups import Entry

_DASHES = ((1.0, 0.0), (5.0, 2.0), (1.5, 1.5), (6.0, 2.0, 1.5, 2.0), (4.0, 1.5, 1.0, 1.5, 1.0, 1.5))


def colour(entry: Entry) -> str:
    """Return the colour of the entry's activation, on white."""
    return STYLES[entry.activation].light


def dots(entry: Entry) -> dict[str, Any]:
    """Return arguments of ``Axes.plot`` for markers without a line."""
    return {
        "marker": STYLES[entry.activation].marker,
        "color": colour(entry),
        "linestyle": "",
    }


def line_styles(entries: Sequence[Entry]) -> dict[str, dict[str, Any]]:
    """Return arguments of ``Axes.plot`` by label.

    The activation sets colour and marker. Dashes distinguish entries of one activation;
    the plain one of the default order is solid.
    """
    counts: dict[str, int] = {}
    styles: dict[str, dict[str, Any]] = {}
    for entry in entries:
        number = 0
        if not (entry.plain and entry.order in (None, ModelConfig.activation_order)):
            number = counts[entry.activation] = counts.get(entry.activation, 0) + 1
        pattern = _DASHES[number % len(_DASHES)]
        styles[entry.label] = {
            "color": colour(entry),
            "marker": STYLES[entry.activation].marker,
            "markersize": 3.5,
            "linestyle": (0.0, pattern if number % len(_DASHES) else None),
        }
    return styles
