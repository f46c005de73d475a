"""Check token files: index, sizes, hashes, token ids and document boundaries.

    megapoly preprocess verify tokens/books
    megapoly preprocess verify data/c4_text_document --vocab-size 50280 --quick

PREFIX is the path of a pair without .bin and .idx, or of PREFIX.manifest.json, which names all
pairs of a run. Sizes and hashes are compared with the manifest, if it exists.

The exit status is 0 if everything is correct, 1 if not, and 2 if a pair cannot be checked.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console

from megapoly.config.command_line import at_least
from megapoly.data.index_file import Index, read_index
from megapoly.data.preprocess.index_checks import index_problems
from megapoly.data.preprocess.length_statistics import LengthStatistics
from megapoly.data.preprocess.pair_with_manifest import PairWithManifest, add_prefixes, find_pairs
from megapoly.data.token_files import pair_paths, sha256_of
from megapoly.data.tokenizer import load_tokenizer
from megapoly.errors import DataError
from megapoly.platform.progress import bytes_bar

_BLOCK_BYTES = 16 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add_prefixes(parser)
    add = parser.add_argument
    add(
        "--vocab-size",
        type=at_least(1),
        metavar="N",
        help="token ids must be below N (default: from the manifest)",
    )
    add(
        "--tokenizer-model",
        metavar="PATH",
        help="a tokenizer.json or its folder: documents must end with its end-of-document token",
    )
    add("--quick", action="store_true", help="check only sizes and index; do not read .bin")


def run(options: argparse.Namespace) -> int:
    """Check pairs and print the results; return the exit status, see the module."""
    pairs = [pair for prefix in options.prefixes for pair in find_pairs(prefix)]
    tokenizer = load_tokenizer(options.tokenizer_model) if options.tokenizer_model else None
    problems: list[str] = []
    is_missing = False
    for pair in pairs:
        expectations = Expectations.of(pair)
        if tokenizer is not None:
            expectations.eod = tokenizer.eod
            expectations.vocab_size = expectations.vocab_size or tokenizer.vocab_size
        expectations.vocab_size = options.vocab_size or expectations.vocab_size
        report = verify_with_progress(pair, expectations, quick=options.quick)
        print(pair.prefix)
        for check, found in report.found.items():
            print(f"  {check:<13} {found}")
        for problem in report.problems:
            print(problem)
        problems += report.problems
        is_missing |= report.is_missing
    if is_missing:
        return 2
    print("no problems" if not problems else f"problems: {len(problems)}")
    return 1 if problems else 0


@dataclass
class Expectations:
    """Expected token ids of a pair.

    Args:
        vocab_size: all ids are below it.
        eod: every document that is not empty ends with it.
        prefix: every document that is not empty begins with these ids.
    """

    vocab_size: int | None = None
    eod: int | None = None
    prefix: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, pair: PairWithManifest) -> Expectations:
        """Return the expectations of the manifest."""
        record = pair.manifest.tokenizer if pair.manifest else None
        if record is None:
            return cls()
        return cls(record.vocab_size, record.eod if record.appends_eod else None, record.prefix)


@dataclass
class PairReport:
    """Results for one pair.

    Args:
        found: what each check found, as text.
        problems: messages with rule, values and remedy.
        is_missing: whether a file of the pair does not exist.
    """

    found: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    is_missing: bool = False

    def add(self, check: str, found: str, problems: Iterator[str] | list[str]) -> None:
        """Record the result of a check."""
        new = list(problems)
        self.found[check] = found if not new else f"WRONG: {found}"
        self.problems += new


def verify_with_progress(
    pair: PairWithManifest, expected: Expectations, *, quick: bool
) -> PairReport:
    """Call :func:`verify` with a progress bar."""
    path = pair_paths(pair.prefix)[0]
    size, console = path.stat().st_size if path.is_file() else 0, Console(stderr=True)
    with bytes_bar(path.name, size, console, transient=True) as advance:
        return verify(pair, expected, quick=quick, advance=advance)


def verify(
    pair: PairWithManifest,
    expected: Expectations,
    *,
    quick: bool = False,
    advance: Callable[[int], None] = lambda size: None,
) -> PairReport:
    """Check a pair; token ids are only checked if index and sizes are correct.

    Args:
        pair: the pair and its manifest.
        expected: expected token ids.
        quick: do not read ``.bin``.
        advance: called with the number of bytes read from ``.bin``.
    """
    report = PairReport()
    bin_path, idx_path = pair_paths(pair.prefix)
    for path in (bin_path, idx_path):
        if not path.is_file():
            report.add(
                "files", f"no {path.name}", [f"`{path}` is missing: copy or create it again."]
            )
            report.is_missing = True
            return report
    try:
        index = read_index(idx_path)
    except DataError as error:
        report.add("index", "damaged", [str(error)])
        return report
    found = f"{index.num_documents:,} documents, {index.num_sequences:,} sequences"
    report.add("index", found, index_problems(idx_path, index))
    sizes = f"{bin_path.stat().st_size:,} and {idx_path.stat().st_size:,} bytes"
    report.add("sizes", sizes, _size_problems(pair, index))
    if report.problems:
        return report
    if pair.record is None:
        report.found["manifest"] = "none: content cannot be compared with a hash"
    else:
        report.add("manifest", "counts and hash of .idx", _record_problems(pair, index, idx_path))
    if not quick:
        _check_content(pair, index, expected, report, advance)
    return report


def _size_problems(pair: PairWithManifest, index: Index) -> Iterator[str]:
    bin_path, idx_path = pair_paths(pair.prefix)
    actual, described = bin_path.stat().st_size, index.num_tokens * index.dtype.itemsize
    if actual != described:
        yield (
            f"`{bin_path}` must have {described:,} bytes, {index.num_tokens:,} tokens of "
            f"{index.dtype.itemsize}, as `{idx_path}` says; it has {actual:,}. One of them is "
            "truncated or belongs to another pair: copy or create both again."
        )


def _record_problems(pair: PairWithManifest, index: Index, idx_path: Path) -> Iterator[str]:
    record = pair.record
    assert record is not None
    statistics = LengthStatistics(index.document_lengths())
    counted = {
        "dtype": index.dtype.name,
        "documents": index.num_documents,
        "sequences": index.num_sequences,
        "tokens": index.num_tokens,
        "tokens_per_document": statistics.quantiles(),
        "idx_sha256": sha256_of(idx_path),
    }
    for name, value in counted.items():
        if getattr(record, name) != value:
            yield (
                f"`{idx_path}` must have the {name} of its manifest, {getattr(record, name)}; it "
                f"has {value}. It is damaged or another file: copy or create the pair again."
            )


@dataclass
class _Content:
    """Results of one pass over ``.bin``."""

    sha256: str = ""
    highest: int = -1
    lowest: int = 0
    num_eod: int = 0
    num_ended: int = 0
    not_ended: int | None = None
    num_not_ended: int = 0
    not_begun: int | None = None
    beyond: tuple[int, int, int] | None = None  # document, position in it, id


def _check_content(
    pair: PairWithManifest,
    index: Index,
    expected: Expectations,
    report: PairReport,
    advance: Callable[[int], None],
) -> None:
    content = _read_content(pair.prefix, index, expected, advance)
    bin_path, record = pair_paths(pair.prefix)[0], pair.record
    if record is not None:
        report.add("hash of .bin", content.sha256, _hash_problems(bin_path, pair, content))
    limit = "no vocabulary to compare with"
    if expected.vocab_size is not None:
        limit = f"the vocabulary has {expected.vocab_size}"
    text = f"{content.lowest} to {content.highest}; {limit}"
    report.add("token ids", text, _id_problems(bin_path, expected, content))
    if expected.eod is not None:
        inside = content.num_eod - content.num_ended
        text = f"{content.num_ended:,} end with {expected.eod}; {inside:,} of these ids are inside"
        report.add("ends", text, _end_problems(bin_path, pair, expected, content))
    if expected.prefix:
        text = f"documents begin with {expected.prefix}"
        report.add("beginnings", text, _beginning_problems(bin_path, expected, content))


def _hash_problems(path: Path, pair: PairWithManifest, content: _Content) -> Iterator[str]:
    record = pair.record
    assert record is not None
    if record.bin_sha256 != content.sha256:
        yield (
            f"`{path}` must have the SHA-256 of its manifest, {record.bin_sha256}; it has "
            f"{content.sha256}. Its content is damaged: copy or create it again."
        )
    if record.highest_token_id != content.highest:
        yield (
            f"`{path}` must have the highest id of its manifest, {record.highest_token_id}; it "
            f"has {content.highest}. Its content is damaged: copy or create it again."
        )


def _id_problems(path: Path, expected: Expectations, content: _Content) -> Iterator[str]:
    if content.beyond is not None:
        document, place, token = content.beyond
        yield (
            f"`{path}`: ids must be 0 or more"
            + (f" and below {expected.vocab_size}" if expected.vocab_size is not None else "")
            + f"; document {document} has {token} at token {place}. It is damaged or of another "
            "tokenizer."
        )


def _end_problems(
    path: Path, pair: PairWithManifest, expected: Expectations, content: _Content
) -> Iterator[str]:
    if content.not_ended is not None:
        yield (
            f"`{path}`: documents must end with {expected.eod}; {content.num_not_ended:,} do not, "
            f"the first is document {content.not_ended}. They were made without --append-eod, or "
            "the pair is damaged."
        )
    record = pair.record
    inside = content.num_eod - content.num_ended
    if record is not None and record.eod_inside >= 0 and inside != record.eod_inside:
        yield (
            f"`{path}` must have {record.eod_inside} ends of document inside documents, as its "
            f"manifest says; it has {inside}. The pair is damaged."
        )


def _beginning_problems(path: Path, expected: Expectations, content: _Content) -> Iterator[str]:
    if content.not_begun is not None:
        yield (
            f"`{path}`: documents must begin with {expected.prefix}; document {content.not_begun} "
            "does not. The pair is damaged."
        )


def _read_content(
    prefix: Path, index: Index, expected: Expectations, advance: Callable[[int], None]
) -> _Content:
    content, digest = _Content(), hashlib.sha256()
    first_document = 0
    with pair_paths(prefix)[0].open("rb") as stream:
        for lengths in index.document_lengths():
            ends = np.cumsum(lengths)
            left = int(ends[-1]) if len(ends) else 0
            done = 0
            while left > 0:
                size = min(_BLOCK_BYTES // index.dtype.itemsize, left)
                data = stream.read(size * index.dtype.itemsize)
                digest.update(data)
                ids = np.frombuffer(data, index.dtype)
                _check_block(content, ids, lengths, ends, done, first_document, expected)
                done, left = done + size, left - size
                advance(len(data))
            first_document += len(lengths)
    content.sha256 = digest.hexdigest()
    return content


def _check_block(
    content: _Content,
    ids: np.ndarray,
    lengths: np.ndarray,
    ends: np.ndarray,
    start: int,
    first_document: int,
    expected: Expectations,
) -> None:
    """Check a block of token ids.

    Args:
        content: results of earlier blocks; updated.
        ids: ids of the block.
        lengths: lengths of some consecutive documents.
        ends: running sum of ``lengths``.
        start: position of the block after the beginning of the first of the documents.
        first_document: number of that document.
        expected: expected token ids.
    """
    stop = start + len(ids)
    highest, lowest = int(ids.max()), int(ids.min())
    content.highest, content.lowest = max(content.highest, highest), min(content.lowest, lowest)
    limit = expected.vocab_size if expected.vocab_size is not None else highest + 1
    if content.beyond is None and (highest >= limit or lowest < 0):
        place = start + int(np.argmax((ids >= limit) | (ids < 0)))
        document = int(np.searchsorted(ends, place, side="right"))
        inside = place - int(ends[document] - lengths[document])
        content.beyond = (first_document + document, inside, int(ids[place - start]))
    has_tokens = lengths > 0
    if expected.eod is not None:
        content.num_eod += int(np.count_nonzero(ids == expected.eod))
        ending = np.flatnonzero(has_tokens & (ends > start) & (ends <= stop))
        is_ended = ids[ends[ending] - 1 - start] == expected.eod
        content.num_ended += int(is_ended.sum())
        content.num_not_ended += int((~is_ended).sum())
        if content.not_ended is None and not is_ended.all():
            content.not_ended = first_document + int(ending[np.argmin(is_ended)])
    for i, token in enumerate(expected.prefix):
        places = ends - lengths + i
        here = np.flatnonzero(has_tokens & (places >= start) & (places < stop))
        is_begun = ids[places[here] - start] == token
        if content.not_begun is None and not is_begun.all():
            content.not_begun = first_document + int(here[np.argmin(is_begun)])
