"""Print statistics of token files: documents, tokens, lengths, frequent tokens, entropy.

    megapoly preprocess stats tokens/books --json stats.json

PREFIX is the path of a pair without .bin and .idx, or of PREFIX.manifest.json, which names all
pairs of a run. One pair is described in full with a histogram of document lengths, several as a
table.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from megapoly.data.index_file import read_index
from megapoly.data.preprocess.length_histogram import histogram_lines
from megapoly.data.preprocess.length_statistics import LengthStatistics
from megapoly.data.preprocess.pair_with_manifest import (
    PairWithManifest,
    add_prefixes,
    find_pairs,
    find_tokenizer,
)
from megapoly.data.token_files import (
    entropy_of,
    open_token_file,
    pair_paths,
    token_counts,
)
from megapoly.platform.files import write_text

_MOST_FREQUENT = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add_prefixes(parser)
    add = parser.add_argument
    add(
        "--tokenizer-model",
        metavar="PATH",
        help="tokenizer that decodes tokens (default: from the manifest)",
    )
    add("--json", type=Path, metavar="FILE", help="also write the statistics as JSON")


@dataclass(frozen=True)
class PairStatistics:
    """Statistics of a pair.

    Args:
        prefix: prefix of the pair.
        dtype: numpy's name for the type of a token id.
        documents: documents.
        sequences: sequences.
        tokens: tokens.
        bin_bytes: size of ``.bin``.
        tokens_per_document: as in the manifest.
        distinct_ids: number of ids that occur.
        unigram_entropy: entropy of the token frequencies in nats, the loss of the best model
            without context.
        most_frequent: ``{"id", "count", "text"}`` of the most frequent tokens; ``text`` is null
            without a tokenizer.
    """

    prefix: str
    dtype: str
    documents: int
    sequences: int
    tokens: int
    bin_bytes: int
    tokens_per_document: dict[str, float]
    distinct_ids: int
    unigram_entropy: float
    most_frequent: list[dict[str, Any]]


def run(options: argparse.Namespace) -> int:
    """Print statistics, write them with ``--json``, and return 0."""
    pairs = [pair for prefix in options.prefixes for pair in find_pairs(prefix)]
    found = [statistics_of(pair, options.tokenizer_model) for pair in pairs]
    if len(found) == 1:
        print("\n".join(_lines(*found[0])))
    else:
        width = None if sys.stdout.isatty() else 100
        Console(width=width).print(_table([statistics for statistics, _ in found]))
    if options.json:
        content = [asdict(statistics) for statistics, _ in found]
        write_text(options.json, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return 0


def statistics_of(
    pair: PairWithManifest, tokenizer_model: str | None = None
) -> tuple[PairStatistics, LengthStatistics]:
    """Compute the statistics of a pair, reading all of it once.

    Args:
        pair: the pair and its manifest.
        tokenizer_model: see :func:`megapoly.data.preprocess.pair_with_manifest.find_tokenizer`.

    Raises:
        DataError: a file is missing or damaged.
    """
    token_file = open_token_file(pair.prefix)
    bin_path, idx_path = pair_paths(pair.prefix)
    index = read_index(idx_path)
    lengths = LengthStatistics(index.document_lengths())
    counts = token_counts(pair.prefix)
    tokenizer = find_tokenizer(tokenizer_model, pair.manifest)
    order = counts.argsort(kind="stable")[::-1][:_MOST_FREQUENT]
    frequent = [
        {
            "id": int(token),
            "count": int(counts[token]),
            "text": tokenizer.decode([int(token)]) if tokenizer else None,
        }
        for token in order
        if counts[token]
    ]
    statistics = PairStatistics(
        prefix=str(pair.prefix),
        dtype=token_file.dtype.name,
        documents=index.num_documents,
        sequences=index.num_sequences,
        tokens=token_file.num_tokens,
        bin_bytes=bin_path.stat().st_size,
        tokens_per_document=lengths.quantiles(),
        distinct_ids=int((counts > 0).sum()),
        unigram_entropy=entropy_of(counts),
        most_frequent=frequent,
    )
    return statistics, lengths


def _lines(statistics: PairStatistics, lengths: LengthStatistics) -> list[str]:
    """Return the description of one pair."""
    quantiles = statistics.tokens_per_document
    values = {
        "documents": f"{statistics.documents:,}",
        "sequences": f"{statistics.sequences:,}",
        "tokens": f"{statistics.tokens:,} of {statistics.dtype}, {statistics.bin_bytes:,} bytes",
        "lengths": ", ".join(f"{name} {value:,.0f}" for name, value in quantiles.items()),
        "ids": f"{statistics.distinct_ids:,} occur, unigram entropy "
        f"{statistics.unigram_entropy:.3f} nats",
        "most frequent": ", ".join(map(_named, statistics.most_frequent)),
    }
    head = [f"{name:<14} {value}" for name, value in values.items()]
    return [statistics.prefix, *head, "", *histogram_lines(lengths)]


def _table(found: Sequence[PairStatistics]) -> Table:
    table = Table(Column("pair", overflow="fold", min_width=12))
    names = ("documents", "tokens", "of all", "median", "longest", "ids", "nats")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    total = sum(each.tokens for each in found)
    for each in found:
        quantiles = each.tokens_per_document
        table.add_row(
            Path(each.prefix).name,
            f"{each.documents:,}",
            f"{each.tokens:,}",
            f"{each.tokens / max(1, total):.1%}",
            *(f"{quantiles[name]:,.0f}" for name in ("p50", "max")),
            f"{each.distinct_ids:,}",
            f"{each.unigram_entropy:.2f}",
        )
    documents = sum(each.documents for each in found)
    table.add_row("total", f"{documents:,}", f"{total:,}", style="bold")
    return table


def _named(entry: dict[str, Any]) -> str:
    name = repr(entry["text"]) if entry["text"] is not None else str(entry["id"])
    return f"{name} {entry['count']:,}"
