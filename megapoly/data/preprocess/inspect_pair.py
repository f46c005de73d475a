"""Show a document of a pair as text, and the lengths of all documents as a histogram."""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megapoly.data.index_file import Index, read_index
from megapoly.data.preprocess.document_lengths import LengthStatistics
from megapoly.data.preprocess.histogram import histogram_lines, write_histogram
from megapoly.data.preprocess.pairs import document_lengths, find_pairs, find_tokenizer
from megapoly.data.token_files import open_token_file, pair_paths
from megapoly.errors import DataError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add = parser.add_argument
    add("prefix", type=Path, metavar="PREFIX", help="of a pair")
    add(
        "--document",
        type=int,
        nargs="+",
        metavar="N",
        help="which documents, from 0, or from the end with -1 (one at random)",
    )
    add("--tokenizer-model", metavar="PATH", help="to decode with (the manifest's)")
    add("--max-tokens", type=int, default=200, metavar="N", help="to show of a document (200)")
    add("--ids", action="store_true", help="show ids, too")
    add("--random", type=int, metavar="SEED", help="of the choice of a document at random")
    add(
        "--histogram",
        metavar="FILE.png",
        help="draw lengths in place of a document; - draws in the terminal alone",
    )


def run(options: argparse.Namespace) -> int:
    """Show; 0."""
    pairs = find_pairs(options.prefix)
    if len(pairs) > 1:
        names = ", ".join(str(pair.prefix) for pair in pairs)
        raise DataError(f"`{options.prefix}` has several pairs; name one of {names}.")
    (pair,) = pairs
    open_token_file(pair.prefix)
    index = read_index(pair_paths(pair.prefix)[1])
    if options.histogram is not None:
        _draw(pair.prefix, index, options.histogram)
        return 0
    tokenizer = find_tokenizer(options.tokenizer_model, pair.manifest)
    if tokenizer is None:
        raise DataError(
            f"`{pair.prefix}` has no manifest with a tokenizer that is still where it was and the "
            "same; name the tokenizer that made it with --tokenizer-model."
        )
    at_random = random.Random(options.random).randrange(max(1, index.num_documents))
    numbers = options.document or [at_random]
    for document in read_documents(pair.prefix, index, numbers, options.max_tokens):
        shown = (
            "" if len(document.ids) == document.num_tokens else f", the first {len(document.ids)}"
        )
        print(
            f"document {document.number:,} of {index.num_documents:,}: {document.num_tokens:,} "
            f"tokens{shown}, from byte {document.offset_bytes:,}"
        )
        if options.ids:
            print(*document.ids)
        print(tokenizer.decode(document.ids), end="\n\n")
    return 0


def _draw(prefix: Path, index: Index, file: str) -> None:
    statistics = LengthStatistics()
    for lengths in document_lengths(index):
        statistics.add(lengths)
    title = f"{prefix.name}: {statistics.sum:,} tokens in {statistics.count:,} documents"
    print("\n".join([title, *histogram_lines(statistics)]))
    if file != "-":
        write_histogram(statistics, title, Path(file))
        print(f"wrote {file}")


@dataclass(frozen=True)
class Document:
    """The beginning of a document.

    Args:
        number: from 0.
        num_tokens: tokens in all of it.
        offset_bytes: where it begins in ``.bin``.
        ids: the first of its tokens.
    """

    number: int
    num_tokens: int
    offset_bytes: int
    ids: list[int]


def read_documents(
    prefix: Path, index: Index, numbers: Sequence[int], max_tokens: int
) -> list[Document]:
    """Read the beginnings of documents.

    Args:
        prefix: of the pair.
        index: of the pair.
        numbers: from 0, or below it from the end.
        max_tokens: of each.

    Raises:
        DataError: there is no such document.
    """
    count = index.num_documents
    if count == 0:
        raise DataError(f"`{prefix}` has no document.")
    documents = []
    for number in numbers:
        if not -count <= number < count:
            raise DataError(
                f"`--document` ({number}) must be one of the {count:,} of `{prefix}`: 0 to "
                f"{count - 1}, or -1 to -{count} from the end."
            )
        first, end = index.document_bounds[number % count : number % count + 2]
        num_tokens = int(index.lengths[first:end].sum(dtype=np.int64))
        offset = int(index.offsets[first]) if num_tokens else 0
        with pair_paths(prefix)[0].open("rb") as stream:
            stream.seek(offset)
            data = stream.read(min(num_tokens, max_tokens) * index.dtype.itemsize)
        ids = np.frombuffer(data, index.dtype).tolist()
        documents.append(Document(number % count, num_tokens, offset, ids))
    return documents
