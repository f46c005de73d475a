"""Analyse a trained model: effective ranks, similarity of layers, learned activations.

    megapoly analyze --model runs/moe_tiny
    megapoly analyze --model runs/dense_tiny/checkpoints/iter_0000240 --output DIR
    megapoly analyze --model runs/moe_7b --parts rank coefficients
    megapoly analyze --model runs/moe_tiny --data.validation "{wiki: tokens/w}"
    megapoly analyze --comparison runs/paper/dense runs/paper/moe

With --comparison and the folders of megapoly compare, the first seed's run of each activation at
its learning rate is analysed, unless it is already.

MODEL is a checkpoint `iter_*` of any parallel layout, or a run (its newest checkpoint). One in an
object store, such as s3://bucket/moe_tiny, is copied to ~/.cache/megapoly, verified, and needs
--output; coefficients through training are not in a store. Parts:

rank          effective rank of every FFN weight, from the checkpoint alone, matrix by matrix
similarity    cosine similarity between layers' hidden states, in MoE models also of each expert
coefficients  the activations' coefficients through training, from the run's TensorBoard files
activations   each layer's learned curve, share of each power, saturation and outliers

similarity and activations run the model in this process, on the validation sets of the run or of
--data.validation. Other options of the configuration, `--section.field value`, apply as in
megapoly evaluate. The command writes analysis.json and PNGs, by default to RUN/analysis.
Formulas and methods: docs/reference/analysis.md.

The exit status is 0, or 2 with the reason.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from megapoly.config.command_line import (
    Parser,
    at_least,
    parse_with_overrides,
    path_or_url,
    status_of,
)
from megapoly.platform.logs import show_errors_only
from megapoly.study.analysis.command import (
    DEFAULT_TOKENS,
    PARTS,
    AnalysisRequest,
    analyze,
    of_comparisons,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Analyse and return the exit status; see the module."""
    request, comparisons = _parse(sys.argv[1:] if argv is None else list(argv))
    show_errors_only()
    return status_of(lambda: _analyze(request, comparisons))


def _analyze(request: AnalysisRequest, comparisons: Sequence[Path]) -> int:
    requests = of_comparisons(request, comparisons) if comparisons else [request]
    for each in requests:
        print(f"wrote {analyze(each)}", flush=True)
    if not requests:
        print("all runs are already analysed")
    return 0


def _parse(argv: Sequence[str]) -> tuple[AnalysisRequest, list[Path]]:
    parser = build_parser()
    options, overrides = parse_with_overrides(parser, argv)
    options.parts = tuple(options.parts)
    comparisons = vars(options).pop("comparison")
    if comparisons and options.output:
        parser.error(
            "--output is for a single --model; with --comparison each RUN has its RUN/analysis"
        )
    command = shlex.join(["megapoly", "analyze", *argv])
    request = AnalysisRequest(**vars(options), overrides=tuple(overrides), command=command)
    return request, comparisons


def build_parser() -> Parser:
    """Return the command's parser."""
    parser = Parser("analyze", __doc__, earlier={"--checkpoint": "--model"})
    parser.usage = (
        "%(prog)s (--model MODEL | --comparison FOLDER ...) [options] [--section.field value ...]"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--model",
        dest="checkpoint",
        type=path_or_url,
        help="run (its newest checkpoint), or checkpoint, folder or URL",
    )
    what.add_argument(
        "--comparison",
        nargs="+",
        type=Path,
        default=[],
        metavar="FOLDER",
        help="folders of megapoly compare",
    )
    add = parser.add_argument
    add("--output", type=Path, metavar="DIR", help="folder to write to (default: RUN/analysis)")
    add("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    add(
        "--tokens",
        type=at_least(1),
        metavar="N",
        help=f"tokens of text, over all sets in total (default: {DEFAULT_TOKENS})",
    )
    add(
        "--device",
        choices=("cpu", "cuda"),
        help="default: cuda if available, else cpu",
    )
    return parser
