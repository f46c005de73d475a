"""Measure the PolyCom operators, forward and backward, against other ways to compute them.

    megapoly benchmark operators --json ops.json --plot ops.png
    megapoly benchmark operators --operators polynorm polyrelu --dtypes bf16 fp32 --experts 8

Compared are megapoly's operator on each of ``--backends``, and of ``--against``: ``eager`` (the
authors' form in plain PyTorch: a power, then its norm, in fp32), ``compile`` (torch.compile of
that), ``liger`` (Liger-Kernel's PolyNorm, on CUDA) and ``swiglu`` (silu(x) u of the same width, in
plain PyTorch). The candidates take turns, so that what else the machine does meets all of them; a
ratio compares turns of the same round.

    GB/s      the least traffic by the time: forward reads x and writes y, 2 elements for each of
              x; backward reads x and dy and writes dx, 3. SwiGLU: 3 and 5.
    of copy   GB/s by those of torch's copy_ of x (2 elements) in the same round, into memory that
              is there already; an operator also allocates what it writes
    saved     what forward keeps for backward, parameters aside, in bytes for each element of x
    error     largest difference from float64, by the largest value, of output (forward) and dx
              (backward). A result beyond rounding is reported and ends the tool with status 1.

Before each timed forward and backward a buffer larger than the caches is written, so that x comes
from memory. CUDA is timed with events, behind work that outlasts the launching: Python's time is
not measured. On CPU everything is.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from itertools import product
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from megapoly.benchmarks.activation_forms import (
    DTYPES,
    OPERATORS,
    OTHERS,
    Candidate,
    Case,
    Inputs,
    make_candidates,
    make_inputs,
)
from megapoly.benchmarks.operators_report import Seconds, case_report, print_report
from megapoly.config.command_line import Parser
from megapoly.errors import MegapolyError, UnavailableError
from megapoly.polynomial import DEFAULT_ORDER, ORDERS, Backend

T = TypeVar("T")

SHAPES = {
    "cpu": [(2048, 1536), (2048, 8256)],
    "cuda": [(4096, 1536), (16384, 1536), (4096, 8256), (4096, 11008)],
}
ROUNDS = {"cpu": 20, "cuda": 100}
# The first turn compiles or tunes, the second still allocates.
WARM_UP_TURNS = 3
# Above the last cache of what this runs on: 50 MB in an H100, 126 MB in a B200.
FLUSH_BYTES = 256 * 2**20
# About a millisecond, more than the eager backward needs to launch its kernels.
HEAD_START_CYCLES = 2_000_000


class Stopwatch:
    """Times work that starts with cold caches."""

    def __init__(self, device: torch.device):
        self._is_cuda = device.type == "cuda"
        self._buffer = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def run(self, work: Callable[[], T]) -> tuple[T, float]:
        """What ``work`` returns, and the seconds that it took."""
        self._buffer.zero_()
        return self._run_on_cuda(work) if self._is_cuda else self._run_on_cpu(work)

    def _run_on_cpu(self, work: Callable[[], T]) -> tuple[T, float]:
        start = time.perf_counter()
        result = work()
        return result, time.perf_counter() - start

    def _run_on_cuda(self, work: Callable[[], T]) -> tuple[T, float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(HEAD_START_CYCLES)
        start.record()
        result = work()
        end.record()
        end.synchronize()
        return result, start.elapsed_time(end) / 1e3


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write; 1 if a candidate computes something else, 2 if it cannot run."""
    words = sys.argv[1:] if argv is None else list(argv)
    arguments = _parse(words)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        _check_files(arguments)
        device = _device(arguments.device)
        cases = _cases(arguments, device)
        num_rounds = arguments.rounds or ROUNDS[device.type]
        reports = measure_all(cases, device, arguments.backends, arguments.against, num_rounds)
    except MegapolyError as error:
        print(error, file=sys.stderr)
        return 2
    report = _circumstances(device, words, num_rounds) | {"cases": reports}
    print_report(report)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    if arguments.plot:
        from megapoly.benchmarks.operators_plot import draw

        draw(report, arguments.plot)
    return int(any(candidate["wrong"] for case in reports for candidate in case["candidates"]))


def build_parser() -> Parser:
    """Return the benchmark's parser."""
    parser = Parser("benchmark operators", __doc__)
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], help="(default: cuda if there is one)")
    add("--operators", nargs="+", choices=OPERATORS, default=["polynorm"], help="(%(default)s)")
    add(
        "--order",
        type=int,
        choices=ORDERS,
        default=DEFAULT_ORDER,
        help="highest power (%(default)s)",
    )
    add("--shapes", nargs="+", type=_shape, metavar="ROWSxWIDTH", help=_default_shapes())
    add("--dtypes", nargs="+", choices=list(DTYPES), default=["bf16"], help="(%(default)s)")
    add(
        "--experts",
        type=_positive,
        help="rows sorted by expert, unevenly many, each expert with its own coefficients, and a "
        "router probability a row (default: a dense layer)",
    )
    add("--backends", nargs="+", choices=get_args(Backend), default=["auto"], help="(%(default)s)")
    add(
        "--against",
        nargs="*",
        choices=OTHERS,
        default=["eager", "compile", "liger"],
        help="(%(default)s)",
    )
    add("--rounds", type=_positive, help=f"turns of each (default: {ROUNDS})")
    add("--threads", type=_positive, help="of torch on CPU (default: torch's own choice)")
    add("--json", type=Path, help="file for the results")
    add("--plot", type=Path, help="PNG file for bars (needs matplotlib)")
    return parser


def _parse(words: Sequence[str]) -> argparse.Namespace:
    return build_parser().parse_args(words)


def _default_shapes() -> str:
    shapes = {
        device: " ".join(f"{rows}x{width}" for rows, width in pairs)
        for device, pairs in SHAPES.items()
    }
    return f"tokens and FFN width (default on CPU {shapes['cpu']}, on CUDA {shapes['cuda']})"


def _positive(word: str) -> int:
    if not word.isdecimal() or int(word) == 0:
        raise argparse.ArgumentTypeError(f"{word!r} is not a positive integer")
    return int(word)


def _shape(word: str) -> tuple[int, int]:
    rows, _, width = word.partition("x")
    if not all(number.isdecimal() and int(number) for number in (rows, width)):
        raise argparse.ArgumentTypeError(
            f"{word!r} is not ROWSxWIDTH, two positive integers such as 2048x1536"
        )
    return int(rows), int(width)


def _check_files(arguments: argparse.Namespace) -> None:
    """What would fail after measuring fails before."""
    for file in (arguments.json, arguments.plot):
        if file and not file.resolve().parent.is_dir():
            raise UnavailableError(f"{file} cannot be written: there is no folder {file.parent}.")
    if arguments.plot and not importlib.util.find_spec("matplotlib"):
        raise UnavailableError("`--plot` needs matplotlib: `pip install matplotlib`.")


def _device(name: str | None) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UnavailableError("`--device cuda`: torch sees no CUDA device; use `--device cpu`.")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def _cases(arguments: argparse.Namespace, device: torch.device) -> list[Case]:
    shapes = arguments.shapes or SHAPES[device.type]
    return [
        Case(operator, arguments.order, rows, width, dtype, arguments.experts)
        for operator, dtype, (rows, width) in product(arguments.operators, arguments.dtypes, shapes)
    ]


def measure_all(
    cases: Sequence[Case],
    device: torch.device,
    backends: Sequence[Backend],
    others: Sequence[str],
    num_rounds: int,
) -> list[dict[str, Any]]:
    """The report of every case."""
    stopwatch = Stopwatch(device)
    machine = f"{device.type} {device_name(device)}"
    reports = []
    # Drawn between the rounds only: a thread that redraws would be in the times.
    with Progress(console=Console(stderr=True), auto_refresh=False, transient=True) as progress:
        task = progress.add_task("", total=len(cases) * (num_rounds + WARM_UP_TURNS))
        for case in cases:
            progress.update(task, description=str(case), refresh=True)
            inputs = make_inputs(case, device)
            candidates, missing = make_candidates(case, inputs, backends, others)
            facts = [
                {"errors": c.errors(inputs.grad_output), "saved_bytes": c.saved_bytes()}
                for c in candidates
            ]
            times, copy = measure(
                candidates,
                inputs,
                stopwatch,
                num_rounds,
                lambda: progress.update(task, advance=1, refresh=True),
            )
            report = case_report(case, candidates, facts, times, copy, machine)
            reports.append(report | {"missing": missing})
    return reports


def device_name(device: torch.device) -> str:
    """What the maker calls it, or the system where that cannot be known."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _circumstances(device: torch.device, words: Sequence[str], num_rounds: int) -> dict[str, Any]:
    return {
        "command": shlex.join(["megapoly", "benchmark", "operators", *words]),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": device.type,
        "device_name": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **{package: _version(package) for package in ("triton", "liger-kernel")},
        "rounds": num_rounds,
        "flushed_bytes": FLUSH_BYTES,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def measure(
    candidates: Sequence[Candidate],
    inputs: Inputs,
    stopwatch: Stopwatch,
    num_rounds: int,
    after_round: Callable[[], Any] = lambda: None,
) -> tuple[list[Seconds], list[float]]:
    """Seconds of each candidate and of the copy, by round; warm-up rounds are left out."""
    times, copies = [Seconds() for _ in candidates], []
    scratch, destination = torch.empty_like(inputs.grad_output), torch.empty_like(inputs.x)
    for number in range(-WARM_UP_TURNS, num_rounds):
        copy = stopwatch.run(lambda: destination.copy_(inputs.x))[1]
        turns = [take_turn(c, inputs.grad_output, scratch, stopwatch) for c in candidates]
        if number >= 0:
            copies.append(copy)
            for seconds, (forward, backward) in zip(times, turns, strict=True):
                seconds.forward.append(forward)
                seconds.backward.append(backward)
        after_round()
    return times, copies


def take_turn(
    candidate: Candidate, grad_output: Tensor, scratch: Tensor, stopwatch: Stopwatch
) -> tuple[float, float]:
    """Seconds of one forward and of its backward."""
    scratch.copy_(grad_output)  # Liger-Kernel writes dx over it
    leaves = list(candidate.leaves.values())
    output, forward = stopwatch.run(candidate.forward)
    _, backward = stopwatch.run(lambda: torch.autograd.grad(output, leaves, scratch))
    return forward, backward
