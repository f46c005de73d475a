r"""Turn text into Megatron's token files (.bin and .idx); check, merge and inspect them.

    megapoly preprocess --input data/*.jsonl --output-prefix tokens/books \
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model tokenizer.json --append-eod

writes tokens/books_text_document.bin and .idx, byte for byte as Megatron-LM's
tools/preprocess_data.py does with the same tokenizer.json, and tokens/books.manifest.json, which
describes them. To resume an interrupted run, run the same command again.

Input: .jsonl and .json (one JSON object per line), also compressed as .gz or .zst; .parquet;
.arrow; .txt (one document per file); folders of these; folders of `datasets.save_to_disk`.

Sub-commands, each with its own --help:

    megapoly preprocess verify PREFIX      check hashes, token ids and document boundaries
    megapoly preprocess merge PREFIX ...   merge several pairs into one
    megapoly preprocess inspect PREFIX     print documents, or a histogram of their lengths
    megapoly preprocess stats PREFIX       print counts, quantiles and frequent tokens

Their PREFIX may be the URL of a pair in an object store, such as s3://bucket/tokens/books_text_document,
which is copied to ~/.cache/megapoly and verified.

`megapoly prepare-domains` makes a tokenizer, token files and a recipe of several domains.

The exit status is 0; 1 if verify finds a problem, or if every line of the input is rejected; 2 for
an error, with its reason; 130 after Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from rich.console import Console

from megapoly.config.command_line import Parser, at_least, number, status_of
from megapoly.config.ranges import MOST_PROCESSES
from megapoly.data.preprocess.options import PreprocessOptions
from megapoly.data.preprocess.threads import use_one_thread

# Each is a module with `add_arguments(parser)` and `run(arguments) -> exit status`.
SUBCOMMANDS = {
    "verify": "megapoly.data.preprocess.verify",
    "merge": "megapoly.data.preprocess.merge",
    "inspect": "megapoly.data.preprocess.inspect_pair",
    "stats": "megapoly.data.preprocess.stats",
}

TOKENIZER_TYPES = ("HuggingFaceTokenizer", "GPT2BPETokenizer")
SENTENCEPIECE_TYPES = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
SMALLEST_PART_MIB = 0.004
# Flags of Megatron's tool that are accepted and have no effect, with the reason.
NOT_NEEDED = {
    "--partitions": "workers share the files, and large files are split",
    "--keep-sequential-samples": "documents always keep the order of the input",
    "--log-interval": "progress is shown at fixed intervals of time",
    "--tokenizer-hf-no-use-fast": "only the package tokenizers is used",
}
# Flags of Megatron's tool that are refused, with the reason.
NOT_SUPPORTED = {
    "--split-sentences": "sentences are for BERT; a document is one sequence here",
    "--keep-newlines": "it belongs to --split-sentences",
    "--lang": "it belongs to --split-sentences",
    "--find-optimal-num-workers": "--dry-run estimates the time for a number of workers",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command or a sub-command; see the module for the exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    use_one_thread()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    signal.signal(signal.SIGTERM, _stop)

    def work() -> int:
        if args and not args[0].startswith("-"):
            return _run_subcommand(args[0], args[1:])
        return _preprocess(args)

    try:
        return status_of(work)
    except KeyboardInterrupt:
        print("stopped; the same command resumes from the finished shards", file=sys.stderr)
        return 130


def _stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _run_subcommand(name: str, args: Sequence[str]) -> int:
    if name not in SUBCOMMANDS:
        nearest = difflib.get_close_matches(name, SUBCOMMANDS, n=1, cutoff=0.0)[0]
        build_parser().error(
            f"`{name}` is not a sub-command; the nearest is `{nearest}`. Name input files with "
            "--input."
        )
    arguments = subcommand_parser(name).parse_args(args)
    status: int = importlib.import_module(SUBCOMMANDS[name]).run(arguments)
    return status


def subcommand_parser(name: str) -> Parser:
    """Return the parser of a sub-command."""
    module = importlib.import_module(SUBCOMMANDS[name])
    parser = Parser(f"preprocess {name}", module.__doc__)
    module.add_arguments(parser)
    return parser


def _preprocess(args: Sequence[str]) -> int:
    parser = build_parser()
    arguments = parser.parse_args(args)
    if arguments.tokenizer_type in SENTENCEPIECE_TYPES:
        parser.error(
            f"--tokenizer-type {arguments.tokenizer_type} is not supported: a SentencePiece model "
            "is read from the tokenizer.json of the same model on Hugging Face, with "
            "`--tokenizer-type HuggingFaceTokenizer --tokenizer-model tokenizer.json`"
        )
    for flag, reason in NOT_NEEDED.items():
        if getattr(arguments, flag.removeprefix("--").replace("-", "_")) is not None:
            print(f"{flag} has no effect: {reason}", file=sys.stderr)
    if arguments.part_mib is not None and arguments.part_mib < SMALLEST_PART_MIB:
        parser.error(f"--part-mib ({arguments.part_mib}) must be at least {SMALLEST_PART_MIB}")
    if arguments.use_gigatoken and arguments.tokenizer_backend == "tokenizers":
        parser.error("--use-gigatoken and --tokenizer-backend tokenizers exclude each other")
    options = _options(arguments)
    # Imported here so that --help is fast.
    from megapoly.data.manifest import manifest_path, read_manifest
    from megapoly.data.preprocess.dry_run import dry_run
    from megapoly.data.preprocess.run import preprocess
    from megapoly.data.preprocess.summary import nothing_left, show_summary

    console = Console(stderr=True)
    if arguments.dry_run:
        dry_run(options, Console())
        return 0
    result = preprocess(options, console)
    if result is None:
        print(
            f"{options.output_prefix}: the token files are complete; --overwrite creates them again"
        )
    else:
        show_summary(options, result, Console())
    problem = nothing_left(read_manifest(manifest_path(options.output_prefix)))
    if problem is not None:
        print(problem, file=sys.stderr)
    return 0 if problem is None else 1


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
    """Refuses a flag of Megatron's tool that is not supported, with the reason."""

    def __call__(self, parser: argparse.ArgumentParser, *args: object, **kwargs: object) -> None:
        flag = self.option_strings[0]
        parser.error(f"{flag} is not supported: {NOT_SUPPORTED[flag]}")


def build_parser() -> Parser:
    """Return the command's parser."""
    parser = Parser("preprocess", __doc__)
    _add_input(parser.add_argument_group("input"))
    _add_tokenizer(parser.add_argument_group("tokenizer"))
    _add_output(parser.add_argument_group("output and workers"))
    for flag in NOT_NEEDED:
        parser.add_argument(flag, nargs="?", const="", default=None, help=argparse.SUPPRESS)
    for flag in NOT_SUPPORTED:
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
        help="files, patterns and folders, in the order of reading",
    )
    add(
        "--json-keys",
        nargs="+",
        default=["text"],
        metavar="KEY",
        help="keys of the JSON objects, or columns; each gets its own pair of files (text)",
    )
    add(
        "--on-bad-line",
        choices=("fail", "skip", "quarantine"),
        default="fail",
        help="on a line without a valid text: stop and name it (fail, the default), leave it out "
        "and count it (skip), or also keep it in PREFIX.quarantine.jsonl (quarantine)",
    )
    add(
        "--keep-empty",
        action="store_true",
        help="make an empty text an empty document, as in Megatron's tool, not a bad line",
    )
    add(
        "--max-document-mib",
        type=number(above=0.0, most=1e6),
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
        help=f"{TOKENIZER_TYPES[0]} (the default) or {TOKENIZER_TYPES[1]}; for a SentencePiece "
        "model use the tokenizer.json of the same model",
    )
    add("--tokenizer-model", metavar="PATH", help="a tokenizer.json or its folder (built-in)")
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
        help="do not add the tokenizer's own special tokens, such as Llama's <s>",
    )
    add(
        "--split-special-tokens",
        action="store_true",
        help="treat the name of a special token in a text as text; by default, as in Megatron's "
        "tool, it becomes that token",
    )
    add(
        "--tokenizer-backend",
        choices=("auto", "gigatoken", "tokenizers"),
        default="auto",
        help="gigatoken is many times faster and is compared with tokenizers before and during "
        "the run; auto (the default) uses it if it gives the same ids",
    )
    add("--use-gigatoken", action="store_true", help="same as --tokenizer-backend gigatoken")
    add(
        "--check-every",
        type=at_least(1),
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
        help="prefix of PREFIX_KEY_document.bin and .idx, and PREFIX.manifest.json",
    )
    add(
        "--workers",
        type=at_least(1, MOST_PROCESSES),
        default=os.cpu_count() or 1,
        metavar="N",
        help="number of processes (one per core)",
    )
    add(
        "--part-mib",
        type=number(above=0.0, most=1e6),
        metavar="MIB",
        help="size of a part, the most work that an interruption costs a worker (1 to 64, by the "
        "size of the input; 256 of the text of a compressed file)",
    )
    add("--dry-run", action="store_true", help="read a sample and print expected size and time")
    add("--restart", action="store_true", help="delete the shards of an interrupted run")
    add("--overwrite", action="store_true", help="replace token files that exist")
