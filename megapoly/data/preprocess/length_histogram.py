"""Histogram of document lengths, in the terminal and as PNG."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megapoly.data.preprocess.length_statistics import LengthStatistics
from megapoly.platform import extras

_EIGHTHS = " ▏▎▍▌▋▊▉█"
_BAR_WIDTH = 40


@dataclass(frozen=True)
class LengthHistogram:
    """Documents by length, in bins whose width doubles at every octave.

    Args:
        edges: [bins + 1] int64; bin i holds lengths from edge i to edge i + 1, exclusive.
        documents: [bins] number of documents.
        tokens: [bins] number of tokens in them.
    """

    edges: np.ndarray
    documents: np.ndarray
    tokens: np.ndarray


def length_histogram(statistics: LengthStatistics, *, bins_per_octave: int = 1) -> LengthHistogram:
    """Count documents in bins from the shortest to the longest document."""
    lengths, counts = statistics.by_length()
    top = max(1, int(lengths.max())) if len(lengths) else 1
    octaves = int(np.floor(np.log2(top))) + 1
    edges = np.unique(np.round(2.0 ** (np.arange(octaves * bins_per_octave + 1) / bins_per_octave)))
    edges = np.concatenate([[0], edges]).astype(np.int64)
    place = np.searchsorted(edges, lengths, side="right") - 1
    documents = np.bincount(place, counts, len(edges) - 1).astype(np.int64)
    tokens = np.bincount(place, counts * lengths, len(edges) - 1).astype(np.int64)
    used = np.flatnonzero(documents)
    first, last = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 1)
    return LengthHistogram(edges[first : last + 1], documents[first:last], tokens[first:last])


def histogram_lines(statistics: LengthStatistics) -> list[str]:
    """Return the histogram as lines of text: bin, bar, documents, and their share of the tokens."""
    bins = length_histogram(statistics)
    most, all_tokens = max(1, int(bins.documents.max())), max(1, int(bins.tokens.sum()))
    ranges = [
        f"{low:,} to {high - 1:,}" if high - 1 > low else f"{low:,}"
        for low, high in zip(bins.edges[:-1], bins.edges[1:], strict=True)
    ]
    width = max(map(len, ranges))
    lines = [f"{'tokens':>{width}}  {'documents':<{_BAR_WIDTH}}  {'':>11}  of the tokens"]
    for name, documents, tokens in zip(ranges, bins.documents, bins.tokens, strict=True):
        eighths = round(8 * _BAR_WIDTH * int(documents) / most)
        bar = "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()
        lines.append(
            f"{name:>{width}}  {bar:<{_BAR_WIDTH}}  {documents:>11,}  {tokens / all_tokens:>13.1%}"
        )
    return lines


def write_histogram(statistics: LengthStatistics, title: str, path: Path) -> None:
    """Draw documents and tokens by document length.

    Args:
        statistics: of the documents.
        title: title of the figure.
        path: a PNG, or another format that matplotlib recognizes by its ending.

    Raises:
        UnavailableError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise extras.unavailable(
            "A histogram in a file (`--histogram -` draws in the terminal)", "data", ["matplotlib"]
        ) from error
    bins = length_histogram(statistics, bins_per_octave=2)
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    values = ((upper, bins.documents, "documents"), (lower, bins.tokens, "tokens"))
    for axes, heights, name in values:
        axes.stairs(heights, bins.edges, fill=True, color="#4477aa")
        axes.set_ylabel(name)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylim(bottom=0)
    quantiles = statistics.quantiles()
    for name, style in (("p50", "--"), ("mean", ":")):
        for axes in (upper, lower):
            axes.axvline(max(quantiles[name], 0.5), color="#222222", linestyle=style, linewidth=1)
        label = "median" if name == "p50" else name
        text = f"{label} {quantiles[name]:,.0f}"
        upper.plot([], [], color="#222222", linestyle=style, linewidth=1, label=text)
    upper.legend(frameon=False)
    lower.set_xscale("symlog", base=2, linthresh=1)
    lower.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    lower.set_xlim(bins.edges[0], bins.edges[-1])
    lower.set_xlabel("tokens in a document")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
