"""Several domains of text, ready to train on: tokenizer, token files, validation sets.

    megapoly prepare-domains --output runs/paper/data
    megapoly prepare-domains --input corpora --output runs/domains --vocab-size 2048

Of each domain, a .jsonl file with {"text": ...} a line, every twentieth document is held out. A
byte-level BPE is trained on the others of all domains; without --input the domains are the authors
of the built-in text. OUTPUT/data.yaml then is a recipe of the data alone, with equal shares and a
validation set for each domain:

    bash examples/pretrain_dense.sh --config MODEL.yaml --config OUTPUT/data.yaml

The exit status is 0, or 2 with the reason.
"""

from __future__ import annotations

import os

# As in megapoly preprocess, which says why.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("JE_ARROW_MALLOC_CONF", "background_thread:false")

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from megapoly.config.command_line import Parser, number, status_of, whole


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare; see the module for the exit status."""
    arguments = build_parser().parse_args(argv)
    # Here and not above: --help answers at once.
    from megapoly.data.preprocess.domains import DomainOptions, prepare_domains

    arguments.input = tuple(arguments.input)
    options = DomainOptions(**vars(arguments))

    def work() -> int:
        print(prepare_domains(options, Console(stderr=True)))
        return 0

    return status_of(work)


def build_parser() -> Parser:
    """Return the command's parser."""
    parser = Parser("prepare-domains", __doc__)
    add = parser.add_argument
    add("--input", nargs="+", type=Path, default=[], metavar="PATH", help="files and folders")
    add("--output", required=True, type=Path, metavar="FOLDER", help="folder to make")
    add("--vocab-size", type=whole(257), default=2048, metavar="N", help="of the tokenizer (2048)")
    add("--held-out", type=whole(2), default=20, metavar="N", help="one of N documents (20)")
    add(
        "--tokenizer-mb",
        type=number(above=0.0, most=1e6),
        default=2.0,
        metavar="X",
        help="text of each domain, its first X million characters, to train the tokenizer on (2)",
    )
    return parser
