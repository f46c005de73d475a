"""Estimate size and time of a run from a sample of the files."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megapoly.data.preprocess.backend_check import choose_backend
from megapoly.data.preprocess.input_parts import FileRange, num_units, read_file_range
from megapoly.data.preprocess.input_sample import sample_texts, spread
from megapoly.data.preprocess.options import PreprocessOptions
from megapoly.data.preprocess.run import PreprocessInputs, read_inputs
from megapoly.data.preprocess.source_files import SourceFile
from megapoly.data.preprocess.tokenization import Backend, add_ids

# Of text, in all files.
_SAMPLE_BYTES = 32 << 20
_MAX_FILES = 64
# Several workers at once are slower than one alone, and joining takes time.
_OVERHEAD = 1.15


@dataclass
class Estimate:
    """Counts of a sample.

    Args:
        read_bytes: bytes of the files on disk that were read.
        documents: documents in the sample.
        tokens: tokens in the sample.
        seconds: time to read and tokenize it.
        reasons: number of rejected lines by reason.
    """

    read_bytes: int = 0
    documents: int = 0
    tokens: int = 0
    seconds: float = 0.0
    reasons: Counter[str] = field(default_factory=Counter)


def dry_run(options: PreprocessOptions, console: Console) -> None:
    """Read a sample and print expected size and time; nothing is written.

    Raises:
        DataError: as in :func:`megapoly.data.preprocess.run.preprocess`, if the sample shows it.
    """
    inputs = read_inputs(options)
    sample = sample_texts(inputs.sources, inputs.rules)
    backend, _ = choose_backend(inputs.settings, options.tokenizer_backend, sample)
    backend.encode(sample)  # warm up, so that the time of the first file has no one-time costs
    chosen = spread(len(inputs.sources), _MAX_FILES)
    estimates = {i: _sample(i, inputs, backend, _SAMPLE_BYTES // len(chosen)) for i in chosen}
    total = Estimate()
    for estimate in estimates.values():
        total.read_bytes += estimate.read_bytes
        total.documents += estimate.documents
        total.tokens += estimate.tokens
        total.seconds += estimate.seconds
        total.reasons += estimate.reasons
    console.print(_table(options, inputs, estimates, total, backend))


def _sample(number: int, inputs: PreprocessInputs, backend: Backend, budget: int) -> Estimate:
    """Count the beginning and, for JSON lines, the middle of a file."""
    source, estimate = inputs.sources[number], Estimate()
    start = time.perf_counter()
    for file_range in _sampled_ranges(number, source, budget):
        text_bytes = 0
        for batch in read_file_range(source, file_range, 0, inputs.rules):
            for column in batch.texts:
                estimate.tokens += len(add_ids(backend.encode(column), inputs.settings).ids)
                text_bytes += sum(map(len, column))
            estimate.documents += len(batch.texts[0])
            estimate.read_bytes += batch.source_bytes
            estimate.reasons.update(record.reason for record in batch.rejected)
            if text_bytes >= budget:
                break
    estimate.seconds = time.perf_counter() - start
    return estimate


def _sampled_ranges(number: int, source: SourceFile, budget: int) -> list[FileRange]:
    units = num_units(source)
    if source.format != "jsonl" or units <= budget:
        return [FileRange(number, 0, units)]
    middle = units // 2
    return [FileRange(number, 0, budget // 2), FileRange(number, middle, middle + budget // 2)]


def _table(
    options: PreprocessOptions,
    inputs: PreprocessInputs,
    estimates: dict[int, Estimate],
    total: Estimate,
    backend: Backend,
) -> Table:
    input_bytes = sum(source.size_bytes for source in inputs.sources)
    documents = tokens = 0.0
    # A file that was not sampled counts as the mean of the others.
    for i, source in enumerate(inputs.sources):
        estimate = estimates.get(i, total)
        share = source.size_bytes / estimate.read_bytes if estimate.read_bytes else 0.0
        documents += estimate.documents * share
        tokens += estimate.tokens * share
    speed = total.read_bytes / total.seconds if total.seconds else 0.0
    seconds = _OVERHEAD * input_bytes / (speed * options.workers) if speed else 0.0
    bin_bytes = tokens * inputs.settings.dtype.itemsize
    needed = 2 * bin_bytes + 20 * documents * len(options.json_keys)
    table = Table("dry run: nothing was written", "", title_justify="left")
    rows = {
        "input": f"{len(inputs.sources):,} files, {_size(input_bytes)}",
        "sample": f"{len(estimates):,} files, {_size(total.read_bytes)} in {total.seconds:.1f} s, "
        f"{total.documents:,} documents",
        "tokenizer": f"{inputs.settings.path}, {inputs.settings.num_tokens:,} tokens",
        "backend": backend.name,
        "estimated documents": f"{documents:,.0f}",
        "estimated tokens": f"{tokens:,.0f}",
        "estimated .bin": f"{_size(bin_bytes)} ({inputs.settings.dtype.name})",
        "disk space needed": f"{_size(needed)}; free: {_size(_free(options.output_prefix))}",
        "estimated time": f"{_duration(seconds)} with {options.workers} workers, "
        f"{speed / 1e6:.1f} MB/s each",
        "rejected in sample": ", ".join(f"{n:,} {r}" for r, n in total.reasons.items()) or "0",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _free(prefix: Path) -> int:
    folder = next(parent for parent in prefix.absolute().parents if parent.is_dir())
    return shutil.disk_usage(folder).free


def _size(size_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 1000:
            return f"{size_bytes:.3g} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:,.2f} TB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
