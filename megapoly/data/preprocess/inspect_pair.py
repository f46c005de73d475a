"""Print documents of a pair of token files as text, or a histogram of document lengths.

    megapoly preprocess inspect tokens/books_text_document --document 0 -1
    megapoly preprocess inspect tokens/books_text_document --histogram lengths.png

PREFIX is the path of the pair without .bin and .idx. Without --document a random one is printed.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megapoly.config.command_line import at_least, path_or_url
from megapoly.config.ranges import LARGEST_COUNT, SEEDS_BELOW
from megapoly.data.index_file import Index, read_index
from megapoly.data.preprocess.length_histogram import histogram_lines, write_histogram
from megapoly.data.preprocess.length_statistics import LengthStatistics
from megapoly.data.preprocess.pair_with_manifest import find_pairs, find_tokenizer
from megapoly.data.token_files import negative_id, open_token_file, pair_paths
from megapoly.errors import DataError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add = parser.add_argument
    add("prefix", type=path_or_url, metavar="PREFIX", help="prefix of a pair")
    add(
        "--document",
        type=at_least(-LARGEST_COUNT),
        nargs="+",
        metavar="N",
        help="documents from 0, or from the end with -1 (default: a random one)",
    )
    add("--tokenizer-model", metavar="PATH", help="tokenizer (default: from the manifest)")
    add(
        "--max-tokens",
        type=at_least(0),
        default=200,
        metavar="N",
        help="tokens to print of a document (200)",
    )
    add("--ids", action="store_true", help="also print token ids")
    add(
        "--random",
        type=at_least(0, SEEDS_BELOW - 1),
        metavar="SEED",
        help="seed for the random document",
    )
    add(
        "--histogram",
        metavar="FILE.png",
        help="draw document lengths instead, to a file and the terminal; - for the terminal only",
    )


def run(options: argparse.Namespace) -> int:
    """Print documents or a histogram, and return 0."""
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
            f"`{pair.prefix}` must have a manifest whose tokenizer still exists and has not "
            "changed; it has none. Name the tokenizer that made it with --tokenizer-model."
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
    statistics = LengthStatistics(index.document_lengths())
    title = f"{prefix.name}: {statistics.sum:,} tokens in {statistics.count:,} documents"
    print("\n".join([title, *histogram_lines(statistics)]))
    if file != "-":
        write_histogram(statistics, title, Path(file))
        print(f"wrote {file}")


@dataclass(frozen=True)
class DocumentExcerpt:
    """The beginning of a document.

    Args:
        number: number of the document from 0.
        num_tokens: tokens in the whole document.
        offset_bytes: where the document begins in ``.bin``.
        ids: the first token ids.
    """

    number: int
    num_tokens: int
    offset_bytes: int
    ids: list[int]


def read_documents(
    prefix: Path, index: Index, numbers: Sequence[int], max_tokens: int
) -> list[DocumentExcerpt]:
    """Read the beginnings of documents.

    Args:
        prefix: prefix of the pair.
        index: index of the pair.
        numbers: document numbers from 0; negative ones count from the end.
        max_tokens: tokens to read of each document.

    Raises:
        DataError: a document does not exist, or has a negative id.
    """
    count = index.num_documents
    if count == 0:
        raise DataError(f"`{prefix}` must have at least one document; it has none.")
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
        if min(ids, default=0) < 0:
            raise DataError(negative_id(pair_paths(prefix)[0], min(ids), index.dtype))
        documents.append(DocumentExcerpt(number % count, num_tokens, offset, ids))
    return documents
