"""Look inside a trained model: ranks, similarity of layers, activations as learned.

    python tools/analyze.py --checkpoint runs/moe_tiny
    python tools/analyze.py --checkpoint runs/dense_tiny/checkpoints/iter_0000240 --output DIR
    python tools/analyze.py --checkpoint runs/moe_7b --parts rank coefficients
    python tools/analyze.py --checkpoint runs/moe_tiny --data.validation "{wiki: tokens/w}"
    python tools/analyze.py --comparison runs/paper/dense runs/paper/moe

--comparison takes the folders of tools/compare_activations.py and analyses of each activation the
first seed's run at its learning rate, those that are not analysed yet.

CHECKPOINT is a checkpoint `iter_*` of any parallel layout, or a run (its newest checkpoint). Parts:

rank          effective rank of every FFN weight, from the checkpoint alone, matrix by matrix
similarity    cosine similarity between layers' hidden states, in MoE models also of each expert
coefficients  the activations' coefficients through training, from the run's TensorBoard files
activations   each layer's learned curve, share of each power, saturation and outliers

similarity and activations run the model in this process on the run's validation sets, or on those
of --data.validation; other options of the configuration, `--section.field value`, are read as
tools/evaluate.py reads them. Written are analysis.json and PNGs, by default to RUN/analysis.
Formulas and methods: megapoly/analysis/README.md.

The exit status is 0, or 2 with the reason.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from command_line import parse_with_overrides, parser_of, quieten, run, status_of, whole

from megapoly.analysis.command import DEFAULT_TOKENS, PARTS, Asked, analyze, of_comparisons


def main(argv: Sequence[str] | None = None) -> int:
    """Analyse; see the module for the exit status."""
    words = sys.argv[1:] if argv is None else list(argv)
    asked, comparisons = _parse(words)
    quieten()
    return status_of(lambda: _analyze(asked, comparisons))


def _analyze(asked: Asked, comparisons: Sequence[Path]) -> int:
    all_asked = of_comparisons(asked, comparisons) if comparisons else [asked]
    for each in all_asked:
        print(f"wrote {analyze(each)}", flush=True)
    if not all_asked:
        print("all runs are analysed")
    return 0


def _parse(argv: Sequence[str]) -> tuple[Asked, list[Path]]:
    parser = _parser()
    options, words = parse_with_overrides(parser, argv)
    options.parts = tuple(options.parts)
    comparisons = vars(options).pop("comparison")
    if comparisons and options.output:
        parser.error("--output is for one --checkpoint; a comparison's runs have theirs")
    command = shlex.join(["python", "tools/analyze.py", *argv])
    return Asked(**vars(options), words=tuple(words), command=command), comparisons


def _parser() -> argparse.ArgumentParser:
    parser = parser_of(__doc__)
    parser.usage = (
        "%(prog)s (--checkpoint CHECKPOINT | --comparison FOLDER ...) [options] "
        "[--section.field value ...]"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--checkpoint", type=Path, help="checkpoint or run")
    what.add_argument(
        "--comparison",
        nargs="+",
        type=Path,
        default=[],
        metavar="FOLDER",
        help="of tools/compare_activations.py",
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


if __name__ == "__main__":
    run(main)
