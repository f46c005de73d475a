"""Join finished shards to token files, and write quarantine and manifest."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import megapoly
from megapoly.data.manifest import (
    FORMAT_VERSION,
    Manifest,
    PairRecord,
    RejectedRecord,
    SourceRecord,
    write_manifest,
)
from megapoly.data.preprocess.input_parts import InputPart
from megapoly.data.preprocess.length_statistics import LengthStatistics
from megapoly.data.preprocess.options import PreprocessOptions
from megapoly.data.preprocess.pair_writer import content_of_documents, write_pair
from megapoly.data.preprocess.shards import (
    KeyCounts,
    ShardFolder,
    TokenShard,
    length_chunks,
    source_hash_path,
)
from megapoly.data.preprocess.source_files import SourceFile
from megapoly.data.preprocess.tokenization import TokenizerSettings
from megapoly.errors import DataError
from megapoly.platform.files import renamed_when_complete

_MANIFEST_EXAMPLES = 100


@dataclass(frozen=True)
class FinishedWork:
    """A run whose parts are all finished.

    Args:
        options: options of the command.
        sources: input files.
        settings: tokenizer settings.
        backend: name and version of the library that made the ids.
        parts: parts of the input.
    """

    options: PreprocessOptions
    sources: Sequence[SourceFile]
    settings: TokenizerSettings
    backend: str
    parts: Sequence[InputPart]

    @property
    def folder(self) -> ShardFolder:
        """Folder of the shards."""
        return ShardFolder(self.options.shard_folder, self.options.json_keys)

    @cached_property
    def shards(self) -> list[TokenShard]:
        """All shards, in the order of the input."""
        return [shard for part in self.parts for shard in self.folder.finished(part.index)]

    @property
    def bin_bytes(self) -> int:
        """Size of all ``.bin`` files in total."""
        tokens = sum(counts.tokens for shard in self.shards for counts in shard.keys)
        return tokens * self.settings.dtype.itemsize


def assemble(work: FinishedWork, *, advance: Callable[[int], None]) -> tuple[Manifest, list[int]]:
    """Write all files that have final names, the manifest last.

    Args:
        work: the finished run.
        advance: called with the number of bytes written to ``.bin``.

    Returns:
        The manifest, and the number of tokens of each source.

    Raises:
        DataError: the disk has not enough space, or a source changed during the run.
    """
    sources, tokens = _source_records(work)  # raises before any file has its final name
    pairs = [_write_pair(work, i, key, advance) for i, key in enumerate(work.options.json_keys)]
    rows_before = _rows_before(work)
    if work.options.on_bad_line == "quarantine":
        _write_quarantine(work, rows_before)
    else:
        work.options.quarantine_path.unlink(missing_ok=True)  # of a run with another policy
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        megapoly_version=megapoly.__version__,
        tokenizer=work.settings.record(work.backend),
        arguments=work.options.arguments(),
        sources=sources,
        pairs=pairs,
        rejected=_rejected_record(work, rows_before),
    )
    write_manifest(work.options.output_prefix, manifest)
    return manifest, tokens


def _write_pair(
    work: FinishedWork, number: int, key: str, advance: Callable[[int], None]
) -> PairRecord:
    folder, shards = work.folder, work.shards
    counts = KeyCounts()
    for shard in shards:
        counts.add(shard.keys[number])
    statistics = LengthStatistics(length_chunks(folder, shards, number))
    content = content_of_documents(
        work.settings.dtype,
        [folder.path(shard.part, shard.chunk, f"{number}.bin") for shard in shards],
        counts.sequences,
        counts.documents,
        lambda: length_chunks(folder, shards, number),
    )
    prefix = work.options.pair_prefix(key)
    sizes = content.bin_bytes, content.idx_bytes
    hashes = write_pair(
        prefix, content, folder.folder, on_block=lambda _, block: advance(len(block))
    )
    return PairRecord(
        name=prefix.name,
        dtype=work.settings.dtype.name,
        documents=counts.documents,
        sequences=counts.sequences,
        tokens=counts.tokens,
        highest_token_id=counts.highest_token_id,
        eod_inside=counts.eod_inside,
        tokens_per_document=statistics.quantiles(),
        bin_bytes=sizes[0],
        bin_sha256=hashes.bin_sha256,
        idx_bytes=sizes[1],
        idx_sha256=hashes.idx_sha256,
    )


def _rows_before(work: FinishedWork) -> list[dict[int, int]]:
    """Return, for each shard and each of its files, the rows of the file in earlier shards."""
    total = [0] * len(work.sources)
    before = []
    for shard in work.shards:
        before.append({counts.source: total[counts.source] for counts in shard.sources})
        for counts in shard.sources:
            total[counts.source] += counts.rows
    return before


def _located(work: FinishedWork, entry: dict[str, Any], before: dict[int, int]) -> dict[str, Any]:
    """Return a rejected line with the name of its file and its line number from 1."""
    source, row = entry.pop("source"), entry.pop("row")
    where = {"source": str(work.sources[source].path), "line": before[source] + row + 1}
    return where | entry


def _write_quarantine(work: FinishedWork, rows_before: Sequence[dict[int, int]]) -> None:
    folder = work.folder
    path = work.options.quarantine_path
    with (
        renamed_when_complete(path, folder=folder.folder) as (temporary,),
        temporary.open("w", encoding="utf-8") as stream,
    ):
        for shard, before in zip(work.shards, rows_before, strict=True):
            for entry in _rejected_lines(folder.path(shard.part, shard.chunk, "rejected")):
                stream.write(json.dumps(_located(work, entry, before), ensure_ascii=False) + "\n")


def _rejected_lines(path: Path) -> Iterator[dict[str, Any]]:
    if path.is_file():
        with path.open("rb") as stream:
            yield from map(json.loads, stream)


def _rejected_record(work: FinishedWork, rows_before: Sequence[dict[int, int]]) -> RejectedRecord:
    reasons: Counter[str] = Counter()
    examples: list[dict[str, Any]] = []
    for shard, before in zip(work.shards, rows_before, strict=True):
        reasons.update(shard.reasons)
        missing = _MANIFEST_EXAMPLES - len(examples)
        examples += [_located(work, dict(entry), before) for entry in shard.examples[:missing]]
    return RejectedRecord(
        policy=work.options.on_bad_line,
        total=sum(reasons.values()),
        by_reason=dict(reasons.most_common()),
        examples=examples,
    )


def _source_records(work: FinishedWork) -> tuple[list[SourceRecord], list[int]]:
    documents, rejected, tokens = ([0] * len(work.sources) for _ in range(3))
    hashes = [""] * len(work.sources)
    for shard in work.shards:
        for counts in shard.sources:
            documents[counts.source] += counts.documents
            rejected[counts.source] += counts.rejected
            tokens[counts.source] += counts.tokens
            hashes[counts.source] = counts.sha256 or hashes[counts.source]
    records = []
    for i, source in enumerate(work.sources):
        status = source.path.stat()
        if (status.st_size, status.st_mtime_ns) != (source.size_bytes, source.modified_ns):
            raise DataError(
                f"`{source.path}` must not change during a run; it had {source.size_bytes:,} bytes "
                f"at the start and has {status.st_size:,}, or was written again. Start again with "
                "--restart."
            )
        records.append(
            SourceRecord(
                path=str(source.path),
                format=source.format,
                size_bytes=source.size_bytes,
                sha256=hashes[i] or source_hash_path(work.options.shard_folder, i).read_text(),
                documents=documents[i],
                rejected=rejected[i],
                modified_ns=source.modified_ns,
            )
        )
    return records, tokens
