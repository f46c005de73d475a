"""Compare the preprocessor with the usual loop: documents per CPU-second, and peak memory.

    megapoly benchmark preprocess --input corpora/*.jsonl --tokenizer olmo llama2

Speed, for each tokenizer: `usual`, the loop over `json.loads` and
`tokenizers.Tokenizer.encode`, one document at a time, that each worker of other tools runs, in one
process; and megapoly preprocess with each of `--workers`. CPU time is of all processes from
start to end, including imports and loading. Both must write the same bytes. `--copies` reads the
input several times, which shows the speed without the start.

Memory, with the highest number of workers: of the input; of a line of 100 MB that is left out; and
of words that do not repeat, which fill the cache of a tokenizer. Peak memory is the sum over all
processes (PSS: shared memory counts once), sampled every 20 ms. Without --input the built-in text
is read.
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
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from megapoly.config.command_line import Parser, at_least, status_of
from megapoly.config.ranges import MOST_PROCESSES
from megapoly.platform import extras

if TYPE_CHECKING:
    import psutil

GOAL_RATIO = 10.0
GOAL_BYTES = 1 << 30
# One document at a time, as in each worker of other tools.
USUAL_LOOP = """
import json, sys
import numpy as np
import tokenizers
from megapoly.data.tokenizer import load_tokenizer
model, output, *paths = sys.argv[1:]
eod = load_tokenizer(model).eod
tokenizer = tokenizers.Tokenizer.from_str(load_tokenizer(model).json)
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
    """A row of the table: the median run of a method.

    Args:
        tokenizer: name of the tokenizer.
        method: ``usual`` or ``megapoly``.
        workers: number of processes that tokenize.
        documents: number of documents.
        run: median run by CPU time.
        documents_per_cpu_second: documents / CPU time.
        ratio: speed relative to the usual loop.
    """

    tokenizer: str
    method: str
    workers: int
    documents: int
    run: Run
    documents_per_cpu_second: float
    ratio: float


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the tables and write the JSON file; return 2 if it cannot run."""
    options = build_parser().parse_args(argv)
    return status_of(lambda: _measure(options))


def _measure(options: argparse.Namespace) -> int:
    extras.require("The benchmark", "data", ("psutil", *extras.EXTRAS["data"]))
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
    add(
        "--input",
        nargs="+",
        type=Path,
        metavar="FILE",
        help=".jsonl files with `text` (built-in text)",
    )
    add(
        "--tokenizer", nargs="+", default=[None], metavar="PATH", help="as in preprocess (built-in)"
    )
    add(
        "--workers",
        nargs="+",
        type=at_least(1, MOST_PROCESSES),
        default=[1, os.cpu_count() or 1],
        metavar="N",
        help="numbers of processes (1, and one per core)",
    )
    add(
        "--copies",
        type=at_least(1),
        default=1,
        metavar="N",
        help="read the input this often in one run (1)",
    )
    add("--rounds", type=at_least(1), default=3, metavar="N", help="runs of each method (3)")
    add(
        "--hostile-mb",
        type=at_least(1),
        default=1000,
        metavar="N",
        help="MB of unrepeated words (1000)",
    )
    add("--json", type=Path, metavar="FILE", help="also write the results as JSON")
    return parser


def _inputs(options: argparse.Namespace, folder: Path) -> list[Path]:
    """Return the files of one run, each copied ``--copies`` times."""
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
                    raise SystemExit(f"{name}: the bytes differ from the usual loop's")
    usual_run = _median(runs[0])
    for count, found in runs.items():
        run = _median(found)
        yield Row(
            name,
            "megapoly" if count else "usual",
            max(1, count),
            documents,
            run,
            documents / run.cpu_seconds,
            usual_run.cpu_seconds / run.cpu_seconds,
        )


def _usual(inputs: Sequence[Path], model: str | None, output: Path) -> Run:
    from megapoly.data.tokenizer import BUILTIN_TOKENIZER

    args = [sys.executable, "-c", USUAL_LOOP, str(model or BUILTIN_TOKENIZER), str(output)]
    return measure([*args, *map(str, inputs)])


def _preprocess(
    inputs: Sequence[Path], model: str | None, prefix: Path, workers: int, *more: str
) -> Run:
    args = [
        sys.executable,
        "-m",
        "megapoly",
        "preprocess",
        "--input",
        *map(str, inputs),
        "--output-prefix",
    ]
    args += [str(prefix), "--append-eod", "--workers", str(workers), *more]
    return measure([*args, *(["--tokenizer-model", model] if model else [])])


def measure(args: Sequence[str]) -> Run:
    """Run a command and measure all of its processes.

    Raises:
        SystemExit: the command fails; with its error output.
    """
    import psutil

    before, start = os.times(), time.perf_counter()
    process = psutil.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
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
    """Return the memory of a process and its descendants; shared memory counts once."""
    import psutil

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
    for name in ("tokenizer", "method", "workers", "CPU s", "s", "documents / CPU s", "ratio"):
        table.add_column(name, justify="left" if name in ("tokenizer", "method") else "right")
    for row in rows:
        table.add_row(
            row.tokenizer,
            row.method,
            str(row.workers),
            f"{row.run.cpu_seconds:.2f}",
            f"{row.run.seconds:.2f}",
            f"{row.documents_per_cpu_second:,.0f}",
            f"{row.ratio:.1f}",
        )
    usual, ours = (
        sum(row.run.cpu_seconds for row in rows if row.method == method and row.workers == 1)
        for method in ("usual", "megapoly")
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
