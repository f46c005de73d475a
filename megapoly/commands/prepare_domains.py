"""Prepare domains of text for training: tokenizer, token files, validation sets and recipe.

    megapoly prepare-domains --output runs/paper/data
    megapoly prepare-domains --input corpora --output runs/domains --vocab-size 2048

Each domain is a .jsonl file with {"text": ...} on every line. Without --input the domains are the
authors of the built-in text. One in twenty documents of a domain is held out for validation. A
byte-level BPE is trained on the other documents of all domains. FOLDER/data.yaml is a recipe of the
data alone, with equal shares and a validation set for each domain:

    megapoly train --config MODEL --config FOLDER/data.yaml

The exit status is 0, or 2 for an error, with its reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from megapoly.config.command_line import Parser, at_least, number, status_of
from megapoly.data.preprocess.threads import use_one_thread


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare domains and print the path of the recipe; see the module for the exit status."""
    arguments = build_parser().parse_args(argv)
    arguments.input = tuple(arguments.input)
    use_one_thread()

    def work() -> int:
        # Imported here so that --help is fast.
        from megapoly.data.preprocess.domains import DomainOptions, prepare_domains

        print(prepare_domains(DomainOptions(**vars(arguments)), Console(stderr=True)))
        return 0

    return status_of(work)


def build_parser() -> Parser:
    """Return the command's parser."""
    parser = Parser("prepare-domains", __doc__)
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        type=Path,
        default=[],
        metavar="PATH",
        help=".jsonl files and folders of them",
    )
    add("--output", required=True, type=Path, metavar="FOLDER", help="folder to create")
    add(
        "--vocab-size",
        type=at_least(257),
        default=2048,
        metavar="N",
        help="size of the vocabulary (2048)",
    )
    add(
        "--held-out",
        type=at_least(2),
        default=20,
        metavar="N",
        help="hold out one in N documents (20)",
    )
    add(
        "--tokenizer-mb",
        type=number(above=0.0, most=1e6),
        default=2.0,
        metavar="X",
        help="train the tokenizer on the first X million characters of each domain (2)",
    )
    return parser
