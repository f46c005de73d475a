"""The summary at the end of a run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from megapoly.data.manifest import Manifest, SourceRecord, manifest_path
from megapoly.data.preprocess.console_output import print_plain
from megapoly.data.preprocess.options import PreprocessOptions
from megapoly.data.preprocess.run import PreprocessResult

_MAX_ROWS = 20
_MAX_REASONS = 3
_COUNTS = ("MB", "documents", "tokens", "rejected")


def show_summary(options: PreprocessOptions, result: PreprocessResult, console: Console) -> None:
    """Print input files, token files and rejected lines."""
    console.print(_sources_table(result))
    for pair in result.manifest.pairs:
        quantiles = pair.tokens_per_document
        print_plain(
            console,
            f"{options.output_prefix.with_name(pair.name)}.bin: {pair.tokens:,} tokens "
            f"({pair.dtype}, {pair.bin_bytes / 1e6:,.1f} MB) in {pair.documents:,} documents of "
            f"{quantiles['min']:,.0f} to {quantiles['max']:,.0f}, median {quantiles['p50']:,.0f}",
        )
        if pair.eod_inside:
            print_plain(
                console,
                f"  {pair.eod_inside:,} end-of-document tokens are inside documents, because their "
                "text names the token; --split-special-tokens treats it as text",
            )
    _show_rejected(options, result, console)
    print_plain(console, f"manifest: {manifest_path(options.output_prefix)}")
    totals, seconds = result.totals, max(result.seconds, 1e-9)
    print_plain(
        console,
        f"{totals.documents:,} documents in this run of {seconds:.1f} s: "
        f"{totals.documents / seconds:,.0f} documents/s, "
        f"{totals.source_bytes / 1e6 / seconds:.1f} MB/s; {result.cpu_seconds:.1f} CPU-seconds: "
        f"{totals.documents / max(result.cpu_seconds, 1e-9):,.0f} documents/CPU-second",
    )


def nothing_left(manifest: Manifest) -> str | None:
    """Return the message about a run that rejected every line, with the first reasons; else None.

    Args:
        manifest: of the run.
    """
    rejected = manifest.rejected
    if not rejected.total or any(source.documents for source in manifest.sources):
        return None
    first = [f"{e['source']}, {e['line']:,}: {e['reason']}" for e in rejected.examples]
    return (
        f"At least one line must have a valid text; all {rejected.total:,} were rejected: "
        f"{'; '.join(first[:_MAX_REASONS])}{'; ..' if rejected.total > _MAX_REASONS else ''}. Name "
        "the key of the text with --json-keys, or correct the input."
    )


def _sources_table(result: PreprocessResult) -> Table:
    paths = [Path(os.path.abspath(source.path)) for source in result.manifest.sources]
    folder = Path(os.path.commonpath([path.parent for path in paths]))
    table = Table(
        Column(escape(f"file in {folder}"), overflow="fold"),
        *(Column(name, justify="right", no_wrap=True) for name in _COUNTS),
    )
    rows = list(zip(result.manifest.sources, result.tokens, strict=True))
    shown = rows if len(rows) <= _MAX_ROWS else rows[: _MAX_ROWS - 1]
    rest = rows[len(shown) :]
    for source, tokens in shown:
        name = escape(os.path.relpath(source.path, folder))
        table.add_row(name, *_cells([(source, tokens)]))
    for name, group in ((f"{len(rest):,} more", rest), ("total", rows)):
        if group and len(rows) > 1:
            table.add_row(name, *_cells(group), style="bold" if name == "total" else None)
    return table


def _cells(rows: Sequence[tuple[SourceRecord, int]]) -> tuple[str, ...]:
    """Return the sums over some files, in the columns of ``_COUNTS``."""
    return (
        f"{sum(source.size_bytes for source, _ in rows) / 1e6:,.1f}",
        f"{sum(source.documents for source, _ in rows):,}",
        f"{sum(tokens for _, tokens in rows):,}",
        f"{sum(source.rejected for source, _ in rows):,}",
    )


def _show_rejected(options: PreprocessOptions, result: PreprocessResult, console: Console) -> None:
    rejected = result.manifest.rejected
    if not rejected.total:
        return
    table = Table("rejected", "reason", Column("first", overflow="fold"))
    for reason, count in rejected.by_reason.items():
        first = next((e for e in rejected.examples if e["reason"].startswith(reason)), None)
        where = f"{first['source']}, {first['line']:,}" if first else ""
        table.add_row(f"{count:,}", escape(reason), escape(where))
    console.print(table)
    if rejected.policy == "quarantine":
        print_plain(console, f"all rejected lines: {options.quarantine_path}")
