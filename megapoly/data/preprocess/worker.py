"""What one worker does: a part of the input to finished shards."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megapoly.data.files import write_text
from megapoly.data.preprocess.parts import Part, Piece, read_piece, rows_before
from megapoly.data.preprocess.records import Block, RecordRules, Rejected
from megapoly.data.preprocess.shards import ShardFolder, ShardWriter, source_hash_path
from megapoly.data.preprocess.sources import Source
from megapoly.data.preprocess.tokenization import (
    Backend,
    GigatokenBackend,
    ReferenceBackend,
    TokenBatch,
    TokenizerSettings,
    add_ids,
)
from megapoly.data.preprocess.trust import COMPARED_CHARS, compare, compare_ids
from megapoly.data.token_files import sha256_of
from megapoly.errors import DataError

# A part of the input, or the number of a source to hash.
Task = Part | int


@dataclass(frozen=True)
class Job:
    """Everything that a worker has to know.

    Args:
        sources: input files.
        settings: tokenizer.
        rules: what makes a record good.
        backend: ``gigatoken`` or ``tokenizers``.
        on_bad_line: ``fail``, ``skip`` or ``quarantine``.
        check_every: every so many documents of a worker the backend is compared with the reference.
        chunk_bytes: text of a stream that makes one shard.
        folder: of the shards.
    """

    sources: tuple[Source, ...]
    settings: TokenizerSettings
    rules: RecordRules
    backend: str
    on_bad_line: str
    check_every: int
    chunk_bytes: int
    folder: Path


@dataclass(frozen=True)
class Progress:
    """What was done since the last message.

    Args:
        source: place of the file in the list of sources.
        source_bytes: bytes of it on disk.
        documents: documents of it.
        tokens: tokens of them, over all JSON keys.
        rejected: rejected lines or rows.
    """

    source: int
    source_bytes: int
    documents: int
    tokens: int
    rejected: int


class Worker:
    """Does parts of a job.

    Args:
        job: what to do.
        backend: made before a fork and shared by all workers; null: made here.
        reference: as ``backend``.
    """

    def __init__(
        self, job: Job, backend: Backend | None = None, reference: ReferenceBackend | None = None
    ):
        # Workers are the parallelism; a library that starts threads beside them only slows them.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self._job = job
        self._reference = reference or ReferenceBackend(job.settings)
        self._backend = backend or (
            GigatokenBackend(job.settings, self._reference)
            if job.backend == "gigatoken"
            else self._reference
        )
        self._folder = ShardFolder(job.folder, job.rules.keys)
        self._until_check = job.check_every
        self._window = 0

    def do(self, task: Task, report: Callable[[Progress], None]) -> None:
        """Write the shards of a part that are not finished, or the hash of a file.

        Args:
            task: what to do.
            report: called after every block.

        Raises:
            DataError: a bad line with ``on_bad_line`` ``fail``, a file that cannot be read, a full
                disk, or ids that are not those of the reference.
        """
        try:
            if isinstance(task, Part):
                self._write_shards(task, report)
            else:
                self._hash_source(task)
        except ConnectionError:  # the parent is gone
            raise
        except OSError as error:
            raise DataError(
                f"`{error.filename or 'a file'}` cannot be read or written: "
                f"{error.strerror or error}. Finished shards stay: the same command goes on from "
                "them."
            ) from error

    def _write_shards(self, part: Part, report: Callable[[Progress], None]) -> None:
        finished = self._folder.finished(part.index)
        if finished and finished[-1].is_last:
            return
        position = finished[-1].position if finished else 0
        finished_rows = sum(counts.rows for shard in finished for counts in shard.sources)
        writer = self._new_writer(part, len(finished))
        try:
            for piece in part.pieces:
                source = self._job.sources[piece.source]
                text_bytes = rows = first_row = 0
                for block in read_piece(source, piece, position, self._job.rules):
                    if block.rejected and self._job.on_bad_line == "fail":
                        self._fail(piece, block.rejected[0], finished_rows)
                    report(self._write(writer, piece, block, first_row))
                    text_bytes += sum(len(text) for column in block.texts for text in column)
                    rows += block.num_rows
                    if block.position is not None and text_bytes >= self._job.chunk_bytes:
                        writer.finish(is_last=False, position=block.position)
                        writer = self._new_writer(part, writer.chunk + 1)
                        text_bytes, first_row = 0, rows
                if piece.source in part.whole_sources:
                    writer.end_source(piece.source, sha256_of(source.path))
            writer.finish(is_last=True, position=0)
        finally:
            with contextlib.suppress(OSError):  # a full disk, which has been said
                writer.close()

    def _hash_source(self, number: int) -> None:
        """The SHA-256 of a file that several parts read."""
        path = source_hash_path(self._job.folder, number)
        if not path.is_file():
            write_text(path, sha256_of(self._job.sources[number].path))

    def _new_writer(self, part: Part, chunk: int) -> ShardWriter:
        keep = self._job.on_bad_line == "quarantine"
        return ShardWriter(self._folder, part.index, chunk, keep_rejected=keep)

    def _write(self, writer: ShardWriter, piece: Piece, block: Block, first_row: int) -> Progress:
        rejected = [replace(record, row=record.row - first_row) for record in block.rejected]
        batches = [self._ids_of(column) for column in block.texts]
        writer.add(piece.source, batches, rejected)
        writer.end_rows(piece.source, block.num_rows)
        return Progress(
            source=piece.source,
            source_bytes=block.source_bytes,
            documents=len(block.texts[0]),
            tokens=sum(len(batch.ids) for batch, _ in batches),
            rejected=len(rejected),
        )

    def _ids_of(self, texts: Sequence[str]) -> tuple[TokenBatch, int]:
        """Ids of documents, and how many ends of document are inside them."""
        settings = self._job.settings
        batch = self._backend.encode(texts)
        if self._backend is not self._reference:
            self._check(texts, batch)
        eod_inside = int(np.count_nonzero(batch.ids == settings.eod))
        return add_ids(batch, settings), eod_inside

    def _check(self, texts: Sequence[str], batch: TokenBatch) -> None:
        """Compare every n-th document with the reference: what was encoded, of long ones a window.

        Windows of one document after the other begin at other places.
        """
        place = self._until_check - 1
        ends = np.cumsum(batch.lengths)
        while place < len(texts):
            text, end = texts[place], int(ends[place])
            if len(text) <= COMPARED_CHARS:
                ids = batch.ids[end - int(batch.lengths[place]) : end]
                compare_ids(self._backend.name, ids, self._reference, text)
            else:
                first = self._window * COMPARED_CHARS % len(text)
                first = min(first, len(text) - COMPARED_CHARS)
                compare(self._backend, self._reference, [text[first : first + COMPARED_CHARS]])
                self._window += 1
            place += self._job.check_every
        self._until_check = place - len(texts) + 1

    def _fail(self, piece: Piece, record: Rejected, finished_rows: int) -> None:
        """Name the line; a stream that is gone on with has rows in finished shards."""
        source = self._job.sources[piece.source]
        row = rows_before(source, piece) + finished_rows + record.row + 1
        what = {"parquet": "row", "arrow": "row", "txt": "document"}.get(source.format, "line")
        raise DataError(
            f"{source.path}, {what} {row:,}: {record.explanation}. Mend it, or leave such lines "
            "out with `--on-bad-line skip`, or `quarantine`, which keeps them in a file. Finished "
            "shards stay: the same command goes on from them."
        )
