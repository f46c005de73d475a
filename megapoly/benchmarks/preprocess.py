"""Compare the preprocessor with the usual loop: documents per CPU-second, and peak memory.

    megapoly benchmark preprocess --input corpora/*.jsonl --tokenizer olmo llama2

For each tokenizer, in turns: `usual`, the loop of one document at a time over `json.loads` and
`tokenizers.Tokenizer.encode` that the field's tools run in each worker, as one process; and
megapoly preprocess with each of `--workers`, as its users start it. CPU time is of all
processes from their start to their end, imports and loading included. Both must write the same
bytes. `--copies` reads the input several times, which shows the speed without the start.

Then memory, with the most workers: the input; a line of 100 MB that is left out; and words that do
not repeat, which fill the cache of a tokenizer. Peak memory is the sum over all processes (PSS:
what they share counts once), looked at every 20 ms. Without --input the built-in text is read.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from megapoly.config.command_line import Parser

GOAL_RATIO = 10.0
GOAL_BYTES = 1 << 30
# One document at a time, as each worker of the usual tools does.
USUAL_LOOP = """
import json, sys
import numpy as np
import tokenizers
from megapoly.config.command_line import Parser
from megapoly.data.tokenizer import load_tokenizer
model, output, *paths = sys.argv[1:]
eod = load_tokenizer(model).eod
tokenizer = tokenizers.Tokenizer.from_file(str(load_tokenizer(model).path))
with open(output, "wb") as stream:
    for path in paths:
        for line in open(path, encoding="utf-8"):
            ids = tokenizer.encode(json.loads(line)["text"]).ids
            ids.append(eod)
            stream.write(np.array(ids, np.uint16).tobytes())
"""


@dataclass(frozen=True)
class Run:
    """One run of a command.

    Args:
        cpu_seconds: of all processes.
        seconds: wall time.
        peak_bytes: highest sum of the memory of all processes.
    """

    cpu_seconds: float
    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Row:
    """A line of the table: the median run of a way.

    Args:
        tokenizer: name.
        way: ``usual``, or ``preprocess_data.py``.
        workers: processes that tokenize.
        documents: documents.
        run: the median by CPU time.
        documents_per_cpu_second: documents / CPU time.
        ratio: to the usual loop.
    """

    tokenizer: str
    way: str
    workers: int
    documents: int
    run: Run
    documents_per_cpu_second: float
    ratio: float


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the tables and write the JSON file; 1 if the bytes differ."""
    options = _parse(argv)
    console = Console()
    with tempfile.TemporaryDirectory(prefix="benchmark-preprocess-") as name:
        folder = Path(name)
        inputs = _inputs(options, folder)
        documents = sum(_count_lines(path) for path in inputs)
        rows = [
            row for model in options.tokenizer for row in _speed(options, inputs, model, documents)
        ]
        console.print(_speed_table(rows, sum(path.stat().st_size for path in inputs)))
        memory = _memory(options, inputs, folder)
        console.print(_memory_table(memory, max(options.workers)))
    if options.json:
        report: dict[str, Any] = {"input_documents": documents, "copies": options.copies}
        report |= {"speed": [asdict(row) for row in rows]}
        report |= {"memory": {name: asdict(run) for name, run in memory.items()}}
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def build_parser() -> Parser:
    """Return the benchmark's parser."""
    parser = Parser("benchmark preprocess", __doc__)
    add = parser.add_argument
    add("--input", nargs="+", type=Path, metavar="FILE", help=".jsonl with `text` (built-in text)")
    add("--tokenizer", nargs="+", default=[None], metavar="PATH", help="(the built-in one)")
    add("--workers", nargs="+", type=int, default=[1, os.cpu_count() or 1], metavar="N")
    add("--copies", type=int, default=1, help="how often the input is read in one run (1)")
    add("--rounds", type=int, default=3, help="turns of each (3)")
    add("--hostile-mb", type=int, default=1000, help="of words that do not repeat (1000)")
    add("--json", type=Path, metavar="FILE", help="for the results")
    return parser


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    return build_parser().parse_args(argv)


def _inputs(options: argparse.Namespace, folder: Path) -> list[Path]:
    """The files of one run; copies are links."""
    paths = options.input
    if paths is None:
        from megapoly.data.builtin import builtin_documents

        paths = [folder / "builtin.jsonl"]
        lines = (json.dumps({"text": document.text}) + "\n" for document in builtin_documents())
        paths[0].write_text("".join(lines))
    copies = []
    for number in range(options.copies):
        for path in paths:
            copy = folder / f"copy-{number:03}-{path.name}"
            copy.write_bytes(path.read_bytes())
            copies.append(copy)
    return copies


def _count_lines(path: Path) -> int:
    with path.open("rb") as stream:
        return sum(1 for _ in stream)


def _speed(
    options: argparse.Namespace, inputs: Sequence[Path], model: str | None, documents: int
) -> Iterator[Row]:
    name = Path(model).name if model else "built-in"
    workers = list(dict.fromkeys(options.workers))
    runs: dict[int, list[Run]] = {count: [] for count in [0, *workers]}
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory(prefix="benchmark-output-") as folder:
            usual = Path(folder) / "usual.bin"
            runs[0].append(_usual(inputs, model, usual))
            for count in workers:
                prefix = Path(folder) / str(count)
                runs[count].append(_preprocess(inputs, model, prefix, count))
                if _hash(usual) != _hash(Path(f"{prefix}_text_document.bin")):
                    raise SystemExit(f"{name}: not the bytes of the usual loop")
    usual_run = _median(runs[0])
    for count, found in runs.items():
        run = _median(found)
        yield Row(
            name,
            "preprocess_data.py" if count else "usual",
            max(1, count),
            documents,
            run,
            documents / run.cpu_seconds,
            usual_run.cpu_seconds / run.cpu_seconds,
        )


def _usual(inputs: Sequence[Path], model: str | None, output: Path) -> Run:
    from megapoly.data.tokenizer import BUILTIN_TOKENIZER

    words = [sys.executable, "-c", USUAL_LOOP, str(model or BUILTIN_TOKENIZER), str(output)]
    return measure([*words, *map(str, inputs)])


def _preprocess(
    inputs: Sequence[Path], model: str | None, prefix: Path, workers: int, *more: str
) -> Run:
    words = [
        sys.executable,
        "-m",
        "megapoly",
        "preprocess",
        "--input",
        *map(str, inputs),
        "--output-prefix",
    ]
    words += [str(prefix), "--append-eod", "--workers", str(workers), *more]
    return measure([*words, *(["--tokenizer-model", model] if model else [])])


def measure(words: Sequence[str]) -> Run:
    """Run a command and watch all of its processes.

    Raises:
        SystemExit: the command fails; with what it said.
    """
    before, start = os.times(), time.perf_counter()
    process = psutil.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    peak = 0
    while process.poll() is None:
        peak = max(peak, _memory_of(process))
        time.sleep(0.02)
    seconds, after = time.perf_counter() - start, os.times()
    if process.returncode:
        raise SystemExit(process.stderr.read())
    cpu = after.children_user + after.children_system
    return Run(cpu - before.children_user - before.children_system, seconds, peak)


def _memory_of(process: psutil.Process) -> int:
    """Memory of a process and all below it; what they share counts once."""
    total = 0
    try:
        for each in [process, *process.children(recursive=True)]:
            total += each.memory_full_info().pss
    except psutil.Error:
        return 0  # one of them has just ended
    return total


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _median(runs: Sequence[Run]) -> Run:
    return sorted(runs, key=lambda run: run.cpu_seconds)[len(runs) // 2]


def _memory(options: argparse.Namespace, inputs: Sequence[Path], folder: Path) -> dict[str, Run]:
    model, workers = options.tokenizer[0], max(options.workers)
    with _hostile_files(folder, options.hostile_mb) as (long_line, random_words):
        given = {
            "the input": (inputs, ()),
            "a line of 100 MB": ([*inputs, long_line], ("--on-bad-line", "skip")),
            f"{options.hostile_mb} MB of words that do not repeat": ([random_words], ()),
        }
        return {
            name: _preprocess(paths, model, folder / f"memory-{i}", workers, *more)
            for i, (name, (paths, more)) in enumerate(given.items())
        }


@contextmanager
def _hostile_files(folder: Path, megabytes: int) -> Iterator[tuple[Path, Path]]:
    long_line, random_words = folder / "long.jsonl", folder / "random.jsonl"
    long_line.write_text(json.dumps({"text": "a b " * 25_000_000}) + "\n")
    random = np.random.default_rng(0)
    with random_words.open("w") as stream:
        for _ in range(megabytes):
            letters = random.integers(97, 123, size=1_000_000, dtype=np.uint8)
            letters[random.random(len(letters)) < 0.12] = 32
            stream.write(json.dumps({"text": letters.tobytes().decode()}) + "\n")
    yield long_line, random_words
    long_line.unlink()
    random_words.unlink()


def _speed_table(rows: Sequence[Row], size_bytes: int) -> Table:
    table = Table(title=f"{rows[0].documents:,} documents, {size_bytes / 1e6:,.1f} MB")
    for name in ("tokenizer", "way", "workers", "CPU s", "s", "documents / CPU s", "ratio"):
        table.add_column(name, justify="left" if name in ("tokenizer", "way") else "right")
    for row in rows:
        table.add_row(
            row.tokenizer,
            row.way,
            str(row.workers),
            f"{row.run.cpu_seconds:.2f}",
            f"{row.run.seconds:.2f}",
            f"{row.documents_per_cpu_second:,.0f}",
            f"{row.ratio:.1f}",
        )
    usual, ours = (
        sum(row.run.cpu_seconds for row in rows if row.way == way and row.workers == 1)
        for way in ("usual", "preprocess_data.py")
    )
    if ours:
        table.caption = (
            f"one worker, all tokenizers together: {usual / ours:.1f} times the documents per "
            f"CPU-second (goal {GOAL_RATIO:g})"
        )
    return table


def _memory_table(memory: dict[str, Run], workers: int) -> Table:
    table = Table(title=f"memory with {workers} workers (goal {GOAL_BYTES / 2**20:,.0f} MiB)")
    table.add_column("input")
    table.add_column("peak MiB, all processes", justify="right")
    for name, run in memory.items():
        table.add_row(name, f"{run.peak_bytes / 2**20:,.0f}")
    return table
