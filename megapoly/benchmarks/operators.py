"""Benchmark forward and backward of the PolyCom operators against other implementations.

    megapoly benchmark operators --json ops.json --plot ops.png
    megapoly benchmark operators --operators polynorm polyrelu --dtypes bf16 fp32 --experts 8

The candidates are megapoly's operator on each of ``--backends``, and ``--against``:
``eager`` (the authors' form in plain PyTorch: a power, then its norm, in fp32), ``compile``
(torch.compile of that), ``liger`` (Liger-Kernel's PolyNorm, on CUDA) and ``swiglu`` (silu(x) u of
the same width, in plain PyTorch). They take turns, so that other work on the machine affects all of
them; a ratio compares turns of the same round.

    GB/s      minimal memory traffic over time: forward reads x and writes y, 2 elements for each
              element of x; backward reads x and dy and writes dx, 3. SwiGLU: 3 and 5.
    of copy   GB/s relative to torch's copy_ of x (2 elements) in the same round, into memory that
              is already allocated; an operator also allocates its output
    saved     bytes that forward keeps for backward, without parameters, for each element of x
    error     largest difference from float64, over the largest value, of output (forward) and dx
              (backward). An error above rounding is reported; the exit status is then 1.

A buffer larger than the caches is written before each timed forward and backward, so that x is read
from memory. CUDA is timed with events, after work that takes longer than launching: Python's time
is not included. On CPU it is.
"""

from __future__ import annotations

import argparse
import importlib.metadata
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
from megapoly.config.command_line import Parser, at_least
from megapoly.config.options import shown
from megapoly.config.ranges import LARGEST_COUNT, MOST_PROCESSES, Range, whole_number
from megapoly.errors import MegapolyError, UnavailableError
from megapoly.platform import extras
from megapoly.platform.device import default_device
from megapoly.polynomial import DEFAULT_ORDER, ORDERS, Backend

T = TypeVar("T")

SHAPES = {
    "cpu": [(2048, 1536), (2048, 8256)],
    "cuda": [(4096, 1536), (16384, 1536), (4096, 8256), (4096, 11008)],
}
ROUNDS = {"cpu": 20, "cuda": 100}
# The first turn compiles or tunes, the second still allocates.
WARM_UP_TURNS = 3
# Larger than the last cache of the devices: 50 MB in an H100, 126 MB in a B200.
FLUSH_BYTES = 256 * 2**20
# About a millisecond, more than the eager backward needs to launch its kernels.
HEAD_START_CYCLES = 2_000_000


class Stopwatch:
    """Times work that starts with cold caches."""

    def __init__(self, device: torch.device):
        self._is_cuda = device.type == "cuda"
        self._buffer = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def run(self, work: Callable[[], T]) -> tuple[T, float]:
        """Return the result of ``work`` and the seconds that it took."""
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
    """Measure, print and write; return 1 if a result is wrong, 2 if it cannot run."""
    given = sys.argv[1:] if argv is None else list(argv)
    arguments = build_parser().parse_args(given)
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
    report = _circumstances(device, given, num_rounds) | {"cases": reports}
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
    add("--device", choices=["cpu", "cuda"], help="default: cuda if available")
    add(
        "--operators",
        nargs="+",
        choices=OPERATORS,
        default=["polynorm"],
        help="(%(default)s)",
    )
    add(
        "--order",
        type=at_least(min(ORDERS), max(ORDERS)),
        choices=ORDERS,
        default=DEFAULT_ORDER,
        help="highest power (%(default)s)",
    )
    add("--shapes", nargs="+", type=_shape, metavar="ROWSxWIDTH", help=_default_shapes())
    add("--dtypes", nargs="+", choices=list(DTYPES), default=["bf16"], help="(%(default)s)")
    add(
        "--experts",
        type=at_least(1, 65_536),
        help="rows sorted by expert, in uneven numbers, with coefficients for each expert and a "
        "router probability for each row (default: a dense layer)",
    )
    add(
        "--backends",
        nargs="+",
        choices=get_args(Backend),
        default=["auto"],
        help="(%(default)s)",
    )
    add(
        "--against",
        nargs="*",
        choices=OTHERS,
        default=["eager", "compile", "liger"],
        help="(%(default)s)",
    )
    add("--rounds", type=at_least(1), help=f"turns of each candidate (default: {ROUNDS})")
    add(
        "--threads",
        type=at_least(1, MOST_PROCESSES),
        help="of torch on CPU (default: chosen by torch)",
    )
    add("--json", type=Path, help="file for the results")
    add("--plot", type=Path, help="PNG file for a bar chart (needs matplotlib)")
    return parser


def _default_shapes() -> str:
    shapes = {
        device: " ".join(f"{rows}x{width}" for rows, width in pairs)
        for device, pairs in SHAPES.items()
    }
    return f"tokens and FFN width (default on CPU {shapes['cpu']}, on CUDA {shapes['cuda']})"


def _shape(text: str) -> tuple[int, int]:
    rows, _, width = text.partition("x")
    numbers = [whole_number(each, Range(1, LARGEST_COUNT)) for each in (rows, width)]
    if numbers[0] is None or numbers[1] is None:
        raise argparse.ArgumentTypeError(
            f"{shown(text)} is not ROWSxWIDTH, two positive integers such as 2048x1536"
        )
    return numbers[0], numbers[1]


def _check_files(arguments: argparse.Namespace) -> None:
    """Check before measuring what would fail after it."""
    for file in (arguments.json, arguments.plot):
        if file and not file.resolve().parent.is_dir():
            raise UnavailableError(f"The folder {file.parent} of {file.name} does not exist.")
    if arguments.plot:
        extras.require("`--plot`", "report", ("matplotlib",))


def _device(name: str | None) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UnavailableError("`--device cuda`: torch sees no CUDA device; use `--device cpu`.")
    return torch.device(name or default_device())


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
    """Measure every case and return the reports."""
    stopwatch = Stopwatch(device)
    machine = f"{device.type} {device_name(device)}"
    reports = []
    # Redraw only between rounds: a thread that redraws would affect the times.
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
    """Return the name of the device or, if it is unknown, of its architecture."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _circumstances(device: torch.device, given: Sequence[str], num_rounds: int) -> dict[str, Any]:
    return {
        "command": shlex.join(["megapoly", "benchmark", "operators", *given]),
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
    """Return seconds of each candidate and of the copy, by round, without warm-up rounds."""
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
    """Return the seconds of one forward and of its backward."""
    scratch.copy_(grad_output)  # Liger-Kernel writes dx over it
    leaves = list(candidate.leaves.values())
    output, forward = stopwatch.run(candidate.forward)
    _, backward = stopwatch.run(lambda: torch.autograd.grad(output, leaves, scratch))
    return forward, backward
