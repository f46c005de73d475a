"""Look inside a trained model: ranks, similarity of layers, activations as learned.

    megapoly analyze --model runs/moe_tiny
    megapoly analyze --model runs/dense_tiny/checkpoints/iter_0000240 --output DIR
    megapoly analyze --model runs/moe_7b --parts rank coefficients
    megapoly analyze --model runs/moe_tiny --data.validation "{wiki: tokens/w}"
    megapoly analyze --comparison runs/paper/dense runs/paper/moe

--comparison takes the folders of megapoly compare and analyses of each activation the
first seed's run at its learning rate, those that are not analysed yet.

MODEL is a checkpoint `iter_*` of any parallel layout, or a run (its newest checkpoint). Parts:

rank          effective rank of every FFN weight, from the checkpoint alone, matrix by matrix
similarity    cosine similarity between layers' hidden states, in MoE models also of each expert
coefficients  the activations' coefficients through training, from the run's TensorBoard files
activations   each layer's learned curve, share of each power, saturation and outliers

similarity and activations run the model in this process on the run's validation sets, or on those
of --data.validation; other options of the configuration, `--section.field value`, are read as
megapoly evaluate reads them. Written are analysis.json and PNGs, by default to RUN/analysis.
Formulas and methods: docs/reference/analysis.md.

The exit status is 0, or 2 with the reason.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from megapoly.config.command_line import Parser, parse_with_overrides, status_of, whole
from megapoly.platform.logs import show_errors_only
from megapoly.study.analysis.command import (
    DEFAULT_TOKENS,
    PARTS,
    AnalysisRequest,
    analyze,
    of_comparisons,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Analyse; see the module for the exit status."""
    words = sys.argv[1:] if argv is None else list(argv)
    asked, comparisons = _parse(words)
    show_errors_only()
    return status_of(lambda: _analyze(asked, comparisons))


def _analyze(asked: AnalysisRequest, comparisons: Sequence[Path]) -> int:
    all_asked = of_comparisons(asked, comparisons) if comparisons else [asked]
    for each in all_asked:
        print(f"wrote {analyze(each)}", flush=True)
    if not all_asked:
        print("all runs are analysed")
    return 0


def _parse(argv: Sequence[str]) -> tuple[AnalysisRequest, list[Path]]:
    parser = build_parser()
    options, words = parse_with_overrides(parser, argv)
    options.parts = tuple(options.parts)
    comparisons = vars(options).pop("comparison")
    if comparisons and options.output:
        parser.error("--output is for one --model; a comparison's runs have theirs")
    command = shlex.join(["megapoly", "analyze", *argv])
    return AnalysisRequest(**vars(options), words=tuple(words), command=command), comparisons


def build_parser() -> Parser:
    """Return the command's parser."""
    parser = Parser("analyze", __doc__, earlier={"--checkpoint": "--model"})
    parser.usage = (
        "%(prog)s (--model MODEL | --comparison FOLDER ...) [options] [--section.field value ...]"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--model", dest="checkpoint", type=Path, help="run (its newest checkpoint), or checkpoint"
    )
    what.add_argument(
        "--comparison",
        nargs="+",
        type=Path,
        default=[],
        metavar="FOLDER",
        help="of megapoly compare",
    )
    add = parser.add_argument
    add("--output", type=Path, metavar="DIR", help="folder to write to (default: RUN/analysis)")
    add("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to look at (default: all)")
    add(
        "--tokens",
        type=whole(1),
        metavar="N",
        help=f"tokens of text, of all sets together (default: {DEFAULT_TOKENS})",
    )
    add(
        "--device",
        choices=("cpu", "cuda"),
        help="where to compute (default: cuda if there is one, else cpu)",
    )
    return parser
