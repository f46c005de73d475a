"""Merge pairs of token files into one, in the order given and in constant memory.

    megapoly preprocess merge a_text_document b_text_document --output-prefix ab_text_document

A PREFIX is the path of a pair without .bin and .idx. Pairs that have a manifest are compared with
it, and must have the same tokenizer.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

import megapoly
from megapoly.config.command_line import path_or_url
from megapoly.data.index_file import Index, read_index
from megapoly.data.manifest import (
    FORMAT_VERSION,
    Manifest,
    PairRecord,
    RejectedRecord,
    SourceRecord,
    TokenizerRecord,
    manifest_path,
    write_manifest,
)
from megapoly.data.preprocess.index_checks import index_problems
from megapoly.data.preprocess.length_statistics import LengthStatistics
from megapoly.data.preprocess.pair_with_manifest import PairWithManifest, local_prefixes
from megapoly.data.preprocess.pair_writer import PairContent, PairHashes, write_pair
from megapoly.data.preprocess.work_folder import locked, remove_work_folder
from megapoly.data.token_files import negative_id, open_token_file, pair_paths
from megapoly.errors import DataError
from megapoly.platform.progress import bytes_bar

_AT_ONCE = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument(
        "prefixes", nargs="*", type=path_or_url, metavar="PREFIX", help="prefixes of pairs"
    )
    parser.add_argument(
        "--input", type=Path, metavar="FOLDER", help="merge all pairs in FOLDER, by name"
    )
    parser.add_argument(
        "--output-prefix",
        type=Path,
        required=True,
        metavar="PREFIX",
        help="prefix of the pair to write",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a pair that exists")


def run(options: argparse.Namespace) -> int:
    """Merge pairs, and return 0."""
    prefixes = [prefix for place in options.prefixes for prefix in local_prefixes(place)]
    if options.input is not None:
        found = sorted(path.with_suffix("") for path in options.input.glob("*.idx"))
        prefixes += [prefix for prefix in found if prefix != options.output_prefix]
    pair = merge(prefixes, options.output_prefix, overwrite=options.overwrite).pairs[0]
    print(
        f"{options.output_prefix}.bin: {pair.tokens:,} tokens ({pair.dtype}) in "
        f"{pair.documents:,} documents, from {len(prefixes):,} pairs"
    )
    return 0


@dataclass
class _InputPair:
    """A pair to merge; hash and highest id are updated while its content is read."""

    prefix: Path
    index: Index
    record: PairRecord | None
    tokenizer: TokenizerRecord | None
    digest: Any = field(default_factory=hashlib.sha256)
    highest_token_id: int = -1

    @property
    def bin_path(self) -> Path:
        return pair_paths(self.prefix)[0]

    def update(self, block: bytes) -> None:
        self.digest.update(block)
        ids = np.frombuffer(block, self.index.dtype)
        if ids.min() < 0:
            raise DataError(negative_id(self.bin_path, int(ids.min()), self.index.dtype))
        self.highest_token_id = max(self.highest_token_id, int(ids.max()))

    def check_hash(self) -> None:
        if self.record is not None and self.record.bin_sha256 != self.digest.hexdigest():
            raise DataError(
                f"`{self.bin_path}` must have the SHA-256 of its manifest, "
                f"{self.record.bin_sha256}; it has {self.digest.hexdigest()}. It is damaged: copy "
                "or create it again."
            )


def merge(prefixes: Sequence[Path], output_prefix: Path, *, overwrite: bool) -> Manifest:
    """Write a pair with the documents of several pairs, one pair after the other.

    Pairs with a manifest are compared with it. The manifest of the result is
    ``OUTPUT_PREFIX.manifest.json``; its sources are the pairs.

    Args:
        prefixes: prefixes of the pairs.
        output_prefix: prefix of the pair to write.
        overwrite: replace a pair that exists.

    Raises:
        DataError: a pair is missing or damaged, dtypes or tokenizers differ, the disk has not
            enough space, or the output exists.
    """
    inputs = [_open(prefix) for prefix in prefixes]
    _check(inputs, output_prefix, overwrite=overwrite)
    indices = [pair.index for pair in inputs]
    content = PairContent(
        dtype=indices[0].dtype,
        bins=[pair.bin_path for pair in inputs],
        num_sequences=sum(index.num_sequences for index in indices),
        num_documents=sum(index.num_documents for index in indices),
        lengths=lambda: (chunk for index in indices for chunk in _slices(index.lengths)),
        sequences_per_document=lambda: (n for i in indices for n in _sequences_per_document(i)),
    )
    folder = Path(f"{output_prefix}.merge")
    with locked(folder):
        hashes = _write_with_progress(output_prefix, content, folder, inputs)
        manifest = _manifest(inputs, output_prefix, content, hashes)
        write_manifest(output_prefix, manifest)
        remove_work_folder(folder)
    return manifest


def _open(prefix: Path) -> _InputPair:
    open_token_file(prefix)
    pair = PairWithManifest.at(prefix)
    tokenizer = pair.manifest.tokenizer if pair.manifest else None
    return _InputPair(prefix, read_index(pair_paths(prefix)[1]), pair.record, tokenizer)


def _check(inputs: Sequence[_InputPair], output_prefix: Path, *, overwrite: bool) -> None:
    if len(inputs) < 2:
        raise DataError(f"merge needs at least 2 pairs; it got {len(inputs)}.")
    outputs = [*pair_paths(output_prefix), manifest_path(output_prefix)]
    if existing := [str(path) for path in outputs if path.exists() and not overwrite]:
        raise DataError(
            f"`--output-prefix` must not name a pair that exists: {', '.join(existing)}. Choose "
            "another, or replace it with --overwrite."
        )
    if output_prefix.absolute() in [pair.prefix.absolute() for pair in inputs]:
        raise DataError(f"`{output_prefix}` must not be input and output; choose another output.")
    first = inputs[0]
    for pair in inputs:
        if pair.index.has_modes:
            raise DataError(f"`{pair.prefix}` must hold text to be merged; it is multimodal.")
        if pair.index.dtype != first.index.dtype:
            raise DataError(
                f"Pairs must have one type of token to be merged; `{first.prefix}` has "
                f"{first.index.dtype}, `{pair.prefix}` {pair.index.dtype}. Name them separately in "
                "the blend instead."
            )
        for problem in index_problems(pair_paths(pair.prefix)[1], pair.index):
            raise DataError(problem)
    known = [pair for pair in inputs if pair.tokenizer is not None]
    for pair in known:
        if _added(pair.tokenizer) != _added(known[0].tokenizer):
            raise DataError(
                f"Pairs must be made with one tokenizer, used in one way, to be merged; in their "
                f"manifests `{known[0].prefix}` has {known[0].tokenizer} and `{pair.prefix}` has "
                f"{pair.tokenizer}."
            )


def _added(tokenizer: TokenizerRecord | None) -> tuple[object, ...]:
    """Return what determines the ids of a text, and the ids that are added."""
    assert tokenizer is not None
    added = (tokenizer.prefix, tokenizer.suffix, tokenizer.eod, tokenizer.appends_eod)
    return (tokenizer.sha256, *added)


def _write_with_progress(
    prefix: Path, content: PairContent, folder: Path, inputs: Sequence[_InputPair]
) -> PairHashes:
    console = Console(stderr=True)
    with bytes_bar("merging", content.bin_bytes, console, transient=True) as advance:

        def on_block(number: int, block: bytes) -> None:
            inputs[number].update(block)
            advance(len(block))

        def check_hashes() -> None:
            for pair in inputs:
                pair.check_hash()

        return write_pair(prefix, content, folder, on_block=on_block, before_naming=check_hashes)


def _slices(array: np.ndarray) -> Iterator[np.ndarray]:
    return (array[start : start + _AT_ONCE] for start in range(0, len(array), _AT_ONCE))


def _sequences_per_document(index: Index) -> Iterator[np.ndarray]:
    bounds = index.document_bounds
    for start in range(0, index.num_documents, _AT_ONCE):
        yield np.diff(bounds[start : start + _AT_ONCE + 1])


def _manifest(
    inputs: Sequence[_InputPair], output_prefix: Path, content: PairContent, hashes: PairHashes
) -> Manifest:
    statistics = LengthStatistics(
        lengths for pair in inputs for lengths in pair.index.document_lengths()
    )
    inside = [pair.record.eod_inside if pair.record else -1 for pair in inputs]
    pair = PairRecord(
        name=output_prefix.name,
        dtype=content.dtype.name,
        documents=content.num_documents,
        sequences=content.num_sequences,
        tokens=statistics.sum,
        highest_token_id=max(pair.highest_token_id for pair in inputs),
        eod_inside=sum(inside) if min(inside) >= 0 else -1,
        tokens_per_document=statistics.quantiles(),
        bin_bytes=content.bin_bytes,
        bin_sha256=hashes.bin_sha256,
        idx_bytes=content.idx_bytes,
        idx_sha256=hashes.idx_sha256,
    )
    tokenizers = [pair.tokenizer for pair in inputs]
    return Manifest(
        format_version=FORMAT_VERSION,
        megapoly_version=megapoly.__version__,
        tokenizer=tokenizers[0] if all(tokenizers) else None,
        arguments={"merge": [str(pair.prefix) for pair in inputs]},
        sources=[_source(pair) for pair in inputs],
        pairs=[pair],
        rejected=RejectedRecord("fail"),
    )


def _source(pair: _InputPair) -> SourceRecord:
    return SourceRecord(
        path=str(pair.bin_path),
        format="pair",
        size_bytes=pair.bin_path.stat().st_size,
        sha256=pair.digest.hexdigest(),
        documents=pair.index.num_documents,
        rejected=0,
    )
