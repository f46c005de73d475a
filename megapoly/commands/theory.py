"""Build the networks of the paper's theorems, measure them, and draw a figure for each statement.

    megapoly theory --output theory

The command writes theory.json and a PNG for each statement. docs/explanation/theory.md describes
what is built and what was found.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from megapoly.config.command_line import Parser, status_of
from megapoly.platform import extras
from megapoly.study.theory import measure

EXPONENTS = sorted({*range(1, 33), *(int(2 ** (i / 8)) for i in range(40, 81)), 63, 127, 255, 511})
TOLERANCES = [10.0**-k for k in range(1, 13)]
CELLS = {
    (1, "PolyReLU"): (2, 4, 8, 16, 32, 64),
    (1, "ReLU"): (2, 4, 8, 16, 32, 64),
    (2, "PolyReLU"): (2, 4, 8, 16),
    (2, "ReLU"): (2, 4, 8, 12),
    (1, "PolyReLU, one layer"): (2, 4, 8, 16, 32, 64),
    (1, "ReLU, one layer"): (2, 4, 8, 16, 32, 64, 256, 1024, 4096),
}
# Orders n; of the networks of one layer those at which they differ.
SMOOTHNESS = {
    (1, "PolyReLU"): (1, 2, 3, 4),
    (1, "ReLU"): (1, 2, 3, 4),
    (2, "PolyReLU"): (2, 3),
    (2, "ReLU"): (2, 3),
    (1, "PolyReLU, one layer"): (2, 3, 4),
    (1, "ReLU, one layer"): (2,),
}
# Below this, 2 N + 1 differs too much from 2 N for a slope in N.
FIT_FROM_CELLS = 4


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write and draw; return 2 if something is missing."""
    arguments = build_parser().parse_args(argv)
    return status_of(lambda: _measure_and_draw(arguments.output))


def _measure_and_draw(folder: Path) -> int:
    extras.require("A figure", "report", ("matplotlib",))
    folder.mkdir(parents=True, exist_ok=True)
    write(folder, measure_all())
    return 0


def build_parser() -> Parser:
    """Return the command's parser."""
    parser = Parser("theory", __doc__)
    parser.add_argument(
        "--output", required=True, type=Path, metavar="FOLDER", help="folder to write to"
    )
    return parser


def measure_all() -> dict[str, Any]:
    """Return the measurements by statement."""
    report: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    work: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "theorem_1": measure.theorem_1,
        "lemma_a4": lambda: measure.lemma_a4(EXPONENTS),
        "lemma_2": lambda: measure.lemma_2(TOLERANCES),
        "theorem_2": lambda: measure.theorem_2(TOLERANCES[:8]),
        "theorem_3": lambda: [
            result
            for (d, kind), cells in CELLS.items()
            for n in SMOOTHNESS[d, kind]
            for result in measure.theorem_3(d, n, cells, kind)
        ],
    }
    for name, run in work.items():
        print(f"{name} ..", flush=True)
        report[name] = run()
    report["fits"] = fits(report)
    return report


def fits(report: dict[str, Any]) -> dict[str, Any]:
    """Fit lines and slopes to the measurements of Lemma 2, Theorem 2 and Theorem 3."""
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
