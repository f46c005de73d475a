"""Build the paper's theorems, measure them, and draw one figure for each.

    megapoly theory --output theory

Written are theory.json and a PNG for each statement. What is built and what was found is in
docs/explanation/theory.md.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from megapoly.config.command_line import Parser
from megapoly.errors import MegapolyError, UnavailableError
from megapoly.study.theory import measure

EXPONENTS = sorted({*range(1, 33), *(int(2 ** (i / 8)) for i in range(40, 81)), 63, 127, 255, 511})
TOLERANCES = [10.0**-k for k in range(1, 13)]
CELLS = {
    (1, "PolyReLU"): (2, 4, 8, 16, 32, 64),
    (1, "ReLU"): (2, 4, 8, 16, 32, 64),
    (2, "PolyReLU"): (2, 4, 8, 16),
    (2, "ReLU"): (2, 4, 8, 12),
}
SMOOTHNESS = {1: (1, 2, 3, 4), 2: (2, 3)}
# Before it 2 N + 1 is too far from 2 N for a slope in N.
FIT_FROM_CELLS = 4


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write and draw; 2 if something is missing."""
    arguments = build_parser().parse_args(argv)
    try:
        if not importlib.util.find_spec("matplotlib"):
            raise UnavailableError("The figures need matplotlib: `pip install matplotlib`.")
        arguments.output.mkdir(parents=True, exist_ok=True)
        write(arguments.output, measure_all())
    except MegapolyError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"`{error.filename}`: {error.strerror or error}", file=sys.stderr)
        return 2
    return 0


def build_parser() -> Parser:
    """Return the command's parser."""
    parser = Parser("theory", __doc__)
    parser.add_argument(
        "--output", required=True, type=Path, metavar="FOLDER", help="folder to write to"
    )
    return parser


def measure_all() -> dict[str, Any]:
    """Every statement's numbers, by statement."""
    report: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    work: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "theorem_1": measure.theorem_1,
        "lemma_a4": lambda: measure.lemma_a4(EXPONENTS),
        "lemma_2": lambda: measure.lemma_2(TOLERANCES),
        "theorem_2": lambda: measure.theorem_2(TOLERANCES[:8]),
        "theorem_3": lambda: [
            result
            for (d, kind), cells in CELLS.items()
            for n in SMOOTHNESS[d]
            for result in measure.theorem_3(d, n, cells, kind)
        ],
    }
    for name, run in work.items():
        print(f"{name} ..", flush=True)
        report[name] = run()
    report["fits"] = fits(report)
    return report


def fits(report: dict[str, Any]) -> dict[str, Any]:
    """Lines and slopes through the numbers of Lemma 2, Theorem 2 and Theorem 3."""
    lines = {
        statement: {
            group: measure.line_in_log(list(results))
            for group, results in groupby(report[statement], key=lambda r: r["group"])
        }
        for statement in ("lemma_2", "theorem_2")
    }
    slopes = [
        {"d": d, "n": n, "kind": kind, "expected": -n / d, "slope": measure.slope(list(results))}
        for (d, n, kind), results in groupby(
            (r for r in report["theorem_3"] if r["N"] >= FIT_FROM_CELLS),
            key=lambda r: (r["d"], r["n"], r["kind"]),
        )
    ]
    return {**lines, "theorem_3": slopes}


def write(folder: Path, report: dict[str, Any]) -> None:
    """Write theory.json and the figures."""
    from megapoly.study.figure_style import png
    from megapoly.study.theory import figures  # matplotlib

    (folder / "theory.json").write_text(json.dumps(report, indent=1) + "\n")
    for name, figure in figures.draw_all(report).items():
        (folder / f"{name}.png").write_bytes(png(figure))
        print(folder / f"{name}.png")
