"""Join several pairs of token files to one, in the order given, in constant memory."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

import megapoly
from megapoly.data.index_file import Index, read_index
from megapoly.data.manifest import (
    FORMAT_VERSION,
    Manifest,
    PairRecord,
    RejectedRecord,
    SourceRecord,
    TokenizerRecord,
    find_manifest,
    manifest_path,
    read_manifest,
    write_manifest,
)
from megapoly.data.preprocess.document_lengths import LengthStatistics
from megapoly.data.preprocess.join import PairContent, PairHashes, write_pair
from megapoly.data.preprocess.pairs import document_lengths
from megapoly.data.preprocess.verify import index_problems
from megapoly.data.preprocess.work_folder import locked, remove
from megapoly.data.token_files import open_token_file, pair_paths
from megapoly.errors import DataError

_AT_ONCE = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("prefixes", nargs="*", type=Path, metavar="PREFIX", help="of the pairs")
    parser.add_argument(
        "--input", type=Path, metavar="FOLDER", help="all pairs in a folder, sorted by name"
    )
    parser.add_argument(
        "--output-prefix", type=Path, required=True, metavar="PREFIX", help="of the pair to write"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a pair that exists")


def run(options: argparse.Namespace) -> int:
    """Merge; 0."""
    prefixes = list(options.prefixes)
    if options.input is not None:
        found = sorted(path.with_suffix("") for path in options.input.glob("*.idx"))
        prefixes += [prefix for prefix in found if prefix != options.output_prefix]
    pair = merge(prefixes, options.output_prefix, overwrite=options.overwrite).pairs[0]
    print(
        f"{options.output_prefix}.bin: {pair.tokens:,} tokens ({pair.dtype}) in "
        f"{pair.documents:,} documents, of {len(prefixes):,} pairs"
    )
    return 0


@dataclass
class _Piece:
    """A pair that is merged, and what its content turns out to be."""

    prefix: Path
    index: Index
    record: PairRecord | None
    tokenizer: TokenizerRecord | None
    digest: Any = field(default_factory=hashlib.sha256)
    highest_token_id: int = -1

    @property
    def bin_path(self) -> Path:
        return pair_paths(self.prefix)[0]

    def see(self, block: bytes) -> None:
        self.digest.update(block)
        ids = np.frombuffer(block, self.index.dtype)
        self.highest_token_id = max(self.highest_token_id, int(ids.max()))

    def check(self) -> None:
        if self.record is not None and self.record.bin_sha256 != self.digest.hexdigest():
            raise DataError(
                f"`{self.bin_path}` must have the SHA-256 of its manifest, "
                f"{self.record.bin_sha256}; it has {self.digest.hexdigest()}. It is damaged: copy "
                "or make it again."
            )


def merge(prefixes: Sequence[Path], output_prefix: Path, *, overwrite: bool) -> Manifest:
    """Write the pair that holds the documents of several, one pair after the other.

    Pairs with a manifest are compared with it. The manifest of the result is
    ``OUTPUT_PREFIX.manifest.json``, its sources are the pairs.

    Args:
        prefixes: of the pairs.
        output_prefix: of the pair to write.
        overwrite: replace a pair that exists.

    Raises:
        DataError: a pair is missing or damaged, types or tokenizers differ, there is no room, or
            the output exists.
    """
    pieces = [_open(prefix) for prefix in prefixes]
    _check(pieces, output_prefix, overwrite=overwrite)
    indices = [piece.index for piece in pieces]
    content = PairContent(
        dtype=indices[0].dtype,
        bins=[piece.bin_path for piece in pieces],
        num_sequences=sum(index.num_sequences for index in indices),
        num_documents=sum(index.num_documents for index in indices),
        lengths=lambda: (part for index in indices for part in _slices(index.lengths)),
        sequences_per_document=lambda: (n for i in indices for n in _sequences_per_document(i)),
    )
    folder = Path(f"{output_prefix}.merge")
    with locked(folder):
        hashes = _write_with_progress(output_prefix, content, folder, pieces)
        manifest = _manifest(pieces, output_prefix, content, hashes)
        write_manifest(output_prefix, manifest)
        remove(folder)
    return manifest


def _open(prefix: Path) -> _Piece:
    open_token_file(prefix)
    path = find_manifest(prefix)
    manifest = read_manifest(path) if path else None
    return _Piece(
        prefix,
        read_index(pair_paths(prefix)[1]),
        manifest.pair(prefix.name) if manifest else None,
        manifest.tokenizer if manifest else None,
    )


def _check(pieces: Sequence[_Piece], output_prefix: Path, *, overwrite: bool) -> None:
    if len(pieces) < 2:
        raise DataError(f"merge needs at least 2 pairs; it got {len(pieces)}.")
    outputs = [*pair_paths(output_prefix), manifest_path(output_prefix)]
    if existing := [str(path) for path in outputs if path.exists() and not overwrite]:
        raise DataError(
            f"`--output-prefix` must not name a pair that exists: {', '.join(existing)}. Choose "
            "another, or replace it with --overwrite."
        )
    if output_prefix.absolute() in [piece.prefix.absolute() for piece in pieces]:
        raise DataError(f"`{output_prefix}` must not be input and output; choose another output.")
    first = pieces[0]
    for piece in pieces:
        if piece.index.has_modes:
            raise DataError(f"`{piece.prefix}` is of several modalities; merge takes text.")
        if piece.index.dtype != first.index.dtype:
            raise DataError(
                f"Pairs must have one type of token to be merged; `{first.prefix}` has "
                f"{first.index.dtype}, `{piece.prefix}` {piece.index.dtype}. They are of different "
                "tokenizers: name them apart in the blend."
            )
        for problem in index_problems(pair_paths(piece.prefix)[1], piece.index):
            raise DataError(problem)
    known = [piece for piece in pieces if piece.tokenizer is not None]
    for piece in known:
        if _added(piece.tokenizer) != _added(known[0].tokenizer):
            raise DataError(
                f"Pairs must be of one tokenizer, used in one way, to be merged; by their "
                f"manifests `{known[0].prefix}` is of {known[0].tokenizer} and `{piece.prefix}` of "
                f"{piece.tokenizer}."
            )


def _added(tokenizer: TokenizerRecord | None) -> tuple[object, ...]:
    """What decides about the ids of a text, and what is put around them."""
    assert tokenizer is not None
    added = (tokenizer.prefix, tokenizer.suffix, tokenizer.eod, tokenizer.appends_eod)
    return (tokenizer.sha256, *added)


def _write_with_progress(
    prefix: Path, content: PairContent, folder: Path, pieces: Sequence[_Piece]
) -> PairHashes:
    columns = (TextColumn("merging"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=content.bin_bytes)

        def on_block(number: int, block: bytes) -> None:
            pieces[number].see(block)
            bar.advance(task, len(block))

        def check() -> None:
            for piece in pieces:
                piece.check()

        return write_pair(prefix, content, folder, on_block=on_block, before_naming=check)


def _slices(array: np.ndarray) -> Iterator[np.ndarray]:
    return (array[start : start + _AT_ONCE] for start in range(0, len(array), _AT_ONCE))


def _sequences_per_document(index: Index) -> Iterator[np.ndarray]:
    bounds = index.document_bounds
    for start in range(0, index.num_documents, _AT_ONCE):
        yield np.diff(bounds[start : start + _AT_ONCE + 1])


def _manifest(
    pieces: Sequence[_Piece], output_prefix: Path, content: PairContent, hashes: PairHashes
) -> Manifest:
    statistics = LengthStatistics()
    for piece in pieces:
        for lengths in document_lengths(piece.index):
            statistics.add(lengths)
    inside = [piece.record.eod_inside if piece.record else -1 for piece in pieces]
    pair = PairRecord(
        name=output_prefix.name,
        dtype=content.dtype.name,
        documents=content.num_documents,
        sequences=content.num_sequences,
        tokens=statistics.sum,
        highest_token_id=max(piece.highest_token_id for piece in pieces),
        eod_inside=sum(inside) if min(inside) >= 0 else -1,
        tokens_per_document=statistics.quantiles(),
        bin_bytes=content.bin_bytes,
        bin_sha256=hashes.bin_sha256,
        idx_bytes=content.idx_bytes,
        idx_sha256=hashes.idx_sha256,
    )
    tokenizers = [piece.tokenizer for piece in pieces]
    return Manifest(
        format_version=FORMAT_VERSION,
        megapoly_version=megapoly.__version__,
        tokenizer=tokenizers[0] if all(tokenizers) else None,
        arguments={"merge": [str(piece.prefix) for piece in pieces]},
        sources=[_source(piece) for piece in pieces],
        pairs=[pair],
        rejected=RejectedRecord("fail"),
    )


def _source(piece: _Piece) -> SourceRecord:
    return SourceRecord(
        path=str(piece.bin_path),
        format="pair",
        size_bytes=piece.bin_path.stat().st_size,
        sha256=piece.digest.hexdigest(),
        documents=piece.index.num_documents,
        rejected=0,
    )
