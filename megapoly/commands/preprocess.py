"""Turn text into Megatron's token files, and look after them.

    megapoly preprocess --input data/*.jsonl --output-prefix tokens/books
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model tokenizer.json --append-eod

writes tokens/books_text_document.bin and .idx, byte for byte what Megatron-LM's tool of this name
writes, and tokens/books.manifest.json. An interrupted run goes on when the same command is given
again. Input: .jsonl and .json (a JSON object a line), both also .gz and .zst; .parquet; .arrow;
.txt (a document a file); patterns; folders of these; folders of `datasets.save_to_disk`.

Other commands:

    megapoly preprocess verify PREFIX      files against hashes, ids, boundaries
    megapoly preprocess merge PREFIX ...   several pairs to one
    megapoly preprocess inspect PREFIX     a document; a histogram of lengths
    megapoly preprocess stats PREFIX       counts, quantiles, frequent tokens

each with --help. The exit status is 0; 1 if verify finds something wrong; 2 with the reason; 130
after Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import os

# A process of one thread can be forked, and its workers then share the loaded tokenizer. The
# libraries would start threads: numpy's for matrices, of which there are none here, pyarrow's to
# give memory back, tokenizers' for batches, beside which workers are the parallelism.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("JE_ARROW_MALLOC_CONF", "background_thread:false")

import argparse
import importlib
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from rich.console import Console

from megapoly.config.command_line import Parser, status_of
from megapoly.data.preprocess import subcommands
from megapoly.data.preprocess.options import PreprocessOptions

TOKENIZER_TYPES = ("HuggingFaceTokenizer", "GPT2BPETokenizer")
SENTENCEPIECE_TYPES = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
SMALLEST_PART_MIB = 0.004
# Of Megatron's tool: what they are for happens here without them.
NOT_NEEDED = {
    "--partitions": "workers share the files, and large ones are cut",
    "--keep-sequential-samples": "documents always keep the order of the input",
    "--log-interval": "progress is shown by time",
    "--tokenizer-hf-no-use-fast": "only the package tokenizers is used",
}
NOT_OFFERED = {
    "--split-sentences": "sentences are for BERT; a document is one sequence here",
    "--keep-newlines": "it goes with --split-sentences",
    "--lang": "it goes with --split-sentences",
    "--find-optimal-num-workers": "--dry-run tells the time for a number of workers",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; see the module for the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    signal.signal(signal.SIGTERM, _stop)

    def work() -> int:
        if words and words[0] in subcommands.COMMANDS:
            return _run_subcommand(words[0], words[1:])
        return _preprocess(words)

    try:
        return status_of(work)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from what is finished", file=sys.stderr)
        return 130


def _stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _run_subcommand(name: str, words: Sequence[str]) -> int:
    module = importlib.import_module(subcommands.COMMANDS[name])
    status: int = module.run(subcommand_parser(name).parse_args(words))
    return status


def subcommand_parser(name: str) -> Parser:
    """Return the parser of `verify`, `merge`, `inspect` or `stats`."""
    module = importlib.import_module(subcommands.COMMANDS[name])
    parser = Parser(f"preprocess {name}", module.__doc__)
    module.add_arguments(parser)
    return parser


def _preprocess(words: Sequence[str]) -> int:
    parser = build_parser()
    arguments = parser.parse_args(words)
    if arguments.tokenizer_type in SENTENCEPIECE_TYPES:
        parser.error(
            f"--tokenizer-type {arguments.tokenizer_type} is not offered: a SentencePiece model is "
            "read from the tokenizer.json that Hugging Face has of the same model, with "
            "`--tokenizer-type HuggingFaceTokenizer --tokenizer-model tokenizer.json`"
        )
    for flag, reason in NOT_NEEDED.items():
        if getattr(arguments, flag.removeprefix("--").replace("-", "_")) is not None:
            print(f"{flag} is not needed: {reason}", file=sys.stderr)
    if arguments.part_mib is not None and arguments.part_mib < SMALLEST_PART_MIB:
        parser.error(f"--part-mib ({arguments.part_mib}) must be at least {SMALLEST_PART_MIB}")
    if arguments.use_gigatoken and arguments.tokenizer_backend == "tokenizers":
        parser.error("--use-gigatoken and --tokenizer-backend tokenizers exclude each other")
    options = _options(arguments)
    # Here and not above: --help answers at once.
    from megapoly.data.preprocess.dry_run import dry_run
    from megapoly.data.preprocess.run import preprocess
    from megapoly.data.preprocess.summary import show_summary

    console = Console(stderr=True)
    if arguments.dry_run:
        dry_run(options, Console())
        return 0
    result = preprocess(options, console)
    if result is None:
        print(
            f"{options.output_prefix}: these token files are complete; --overwrite makes them anew"
        )
    else:
        show_summary(options, result, Console())
    return 0


def _options(arguments: argparse.Namespace) -> PreprocessOptions:
    backend = arguments.tokenizer_backend
    return PreprocessOptions(
        input=tuple(name for group in arguments.input for name in group),
        output_prefix=arguments.output_prefix,
        json_keys=tuple(arguments.json_keys),
        tokenizer_type=arguments.tokenizer_type,
        tokenizer_model=arguments.tokenizer_model,
        vocab_file=arguments.vocab_file,
        merge_file=arguments.merge_file,
        append_eod=arguments.append_eod,
        include_special_tokens=not arguments.tokenizer_hf_no_include_special_tokens,
        split_special_tokens=arguments.split_special_tokens,
        keep_empty=arguments.keep_empty,
        workers=arguments.workers,
        tokenizer_backend="gigatoken" if arguments.use_gigatoken else backend,
        check_every=arguments.check_every,
        on_bad_line=arguments.on_bad_line,
        max_document_mib=arguments.max_document_mib,
        part_bytes=round(arguments.part_mib * 2**20) if arguments.part_mib else None,
        restart=arguments.restart,
        overwrite=arguments.overwrite,
    )


class _Refuse(argparse.Action):
    """A flag of Megatron's tool that is not offered: says why."""

    def __call__(self, parser: argparse.ArgumentParser, *args: object, **kwargs: object) -> None:
        flag = self.option_strings[0]
        parser.error(f"{flag} is not offered: {NOT_OFFERED[flag]}")


def build_parser() -> Parser:
    """Return the command's parser."""
    parser = Parser("preprocess", __doc__)
    _add_input(parser.add_argument_group("input"))
    _add_tokenizer(parser.add_argument_group("tokenizer"))
    _add_output(parser.add_argument_group("output and work"))
    for flag in NOT_NEEDED:
        parser.add_argument(flag, nargs="?", const="", default=None, help=argparse.SUPPRESS)
    for flag in NOT_OFFERED:
        parser.add_argument(flag, nargs="?", action=_Refuse, help=argparse.SUPPRESS)
    return parser


def _add_input(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--input",
        nargs="+",
        action="append",
        required=True,
        metavar="PATH",
        help="files, patterns and folders, read in this order",
    )
    add(
        "--json-keys",
        nargs="+",
        default=["text"],
        metavar="KEY",
        help="keys of the objects, or columns; a pair of files for each (text)",
    )
    add(
        "--on-bad-line",
        choices=("fail", "skip", "quarantine"),
        default="fail",
        help="a line that is no text: stop and name it (fail), count it, or count it and keep it "
        "in PREFIX.quarantine.jsonl",
    )
    add(
        "--keep-empty",
        action="store_true",
        help="an empty text is an empty document, as in Megatron's tool, not a bad line",
    )
    add(
        "--max-document-mib",
        type=_positive(float),
        default=16.0,
        metavar="MIB",
        help="a longer line, row or text file is a bad line (16)",
    )


def _add_tokenizer(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--tokenizer-type",
        choices=(*TOKENIZER_TYPES, *SENTENCEPIECE_TYPES),
        default=TOKENIZER_TYPES[0],
        metavar="TYPE",
        help=f"{' or '.join(TOKENIZER_TYPES)} (the first); for a SentencePiece model take the "
        "tokenizer.json of the same model",
    )
    add("--tokenizer-model", metavar="PATH", help="a tokenizer.json or its folder (the built-in)")
    add("--vocab-file", metavar="FILE", help="vocab.json of a GPT2BPETokenizer")
    add("--merge-file", metavar="FILE", help="merges.txt of a GPT2BPETokenizer")
    add(
        "--append-eod",
        action="store_true",
        help="end every document with the end-of-document token",
    )
    add(
        "--tokenizer-hf-no-include-special-tokens",
        action="store_true",
        help="leave out what the tokenizer adds by itself, such as Llama's <s>",
    )
    add(
        "--split-special-tokens",
        action="store_true",
        help="a text that names a special token has it as text; by default, as in Megatron's "
        "tool, it becomes that token",
    )
    add(
        "--tokenizer-backend",
        choices=("auto", "gigatoken", "tokenizers"),
        default="auto",
        help="gigatoken is many times faster and is compared with tokenizers before and during "
        "the run; auto takes it where it gives the same ids",
    )
    add("--use-gigatoken", action="store_true", help="the same as --tokenizer-backend gigatoken")
    add(
        "--check-every",
        type=_positive(int),
        default=500,
        metavar="N",
        help="compare every N-th document of a worker with tokenizers (500)",
    )


def _add_output(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--output-prefix",
        type=Path,
        required=True,
        metavar="PREFIX",
        help="of PREFIX_KEY_document.bin and .idx, and PREFIX.manifest.json",
    )
    add(
        "--workers",
        type=_positive(int),
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes (one for each core)",
    )
    add(
        "--part-mib",
        type=_positive(float),
        metavar="MIB",
        help="what a worker does at a time, and an interruption can cost it (1 to 64, by the "
        "size of the input; a compressed file: 256 of its text)",
    )
    add("--dry-run", action="store_true", help="read a sample, print expected size and time")
    add("--restart", action="store_true", help="drop what an interrupted run has finished")
    add("--overwrite", action="store_true", help="replace token files that exist")


def _positive(type_: type) -> type:
    def convert(text: str) -> float:
        value: float = type_(text)
        if not 0 < value < float("inf"):
            raise ValueError
        return value

    convert.__name__ = f"{type_.__name__} above 0"
    return convert  # type: ignore[return-value] # argparse takes any callable
