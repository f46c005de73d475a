"""The work of one worker: turn a part of the input into finished shards."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megapoly.data.preprocess.backend_check import COMPARED_CHARS, compare_backends, compare_ids
from megapoly.data.preprocess.input_parts import FileRange, InputPart, read_file_range, rows_before
from megapoly.data.preprocess.shards import ShardFolder, ShardWriter, source_hash_path
from megapoly.data.preprocess.source_files import SourceFile
from megapoly.data.preprocess.text_extraction import RecordRules, Rejection, TextBatch
from megapoly.data.preprocess.tokenization import (
    Backend,
    GigatokenBackend,
    ReferenceBackend,
    TokenBatch,
    TokenizerSettings,
    add_ids,
)
from megapoly.data.token_files import sha256_of
from megapoly.errors import DataError
from megapoly.platform.files import write_text

# A part of the input, or the index of a source file to hash.
Task = InputPart | int


@dataclass(frozen=True)
class WorkerConfig:
    """Settings of a worker.

    Args:
        sources: input files.
        settings: tokenizer settings.
        rules: rules for a valid record.
        backend: ``gigatoken`` or ``tokenizers``.
        on_bad_line: ``fail``, ``skip`` or ``quarantine``.
        check_every: the backend is compared with the reference on every n-th document of a worker.
        chunk_bytes: text of a stream in one shard.
        folder: folder of the shards.
    """

    sources: tuple[SourceFile, ...]
    settings: TokenizerSettings
    rules: RecordRules
    backend: str
    on_bad_line: str
    check_every: int
    chunk_bytes: int
    folder: Path


@dataclass(frozen=True)
class WorkerProgress:
    """Progress of a worker since its last message.

    Args:
        source: index of the file in the list of source files.
        source_bytes: bytes of the file on disk that were processed.
        documents: documents of the file.
        tokens: tokens of them, over all JSON keys.
        rejected: rejected lines or rows.
    """

    source: int
    source_bytes: int
    documents: int
    tokens: int
    rejected: int


class Worker:
    """Processes parts of the input.

    Args:
        config: settings of the worker.
        backend: created before a fork and shared by all workers; None: created here.
        reference: as ``backend``.
    """

    def __init__(
        self,
        config: WorkerConfig,
        backend: Backend | None = None,
        reference: ReferenceBackend | None = None,
    ):
        # Workers are the parallelism; threads of a library would only slow them down.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self._config = config
        self._reference = reference or ReferenceBackend(config.settings)
        self._backend = backend or (
            GigatokenBackend(config.settings, self._reference)
            if config.backend == "gigatoken"
            else self._reference
        )
        self._folder = ShardFolder(config.folder, config.rules.keys)
        self._until_check = config.check_every
        self._window = 0

    def do(self, task: Task, report: Callable[[WorkerProgress], None]) -> None:
        """Write the shards of a part that are not finished, or the hash of a file.

        Args:
            task: the part or file.
            report: called after every batch.

        Raises:
            DataError: a bad line with ``on_bad_line`` ``fail``, a file that cannot be read, a full
                disk, or ids that differ from the reference.
        """
        try:
            if isinstance(task, InputPart):
                self._write_shards(task, report)
            else:
                self._hash_source(task)
        except ConnectionError:  # the parent has died
            raise
        except OSError as error:
            raise DataError(
                f"`{error.filename or 'a file'}` cannot be read or written: "
                f"{error.strerror or error}. Finished shards are kept: the same command resumes "
                "from them."
            ) from error

    def _write_shards(self, part: InputPart, report: Callable[[WorkerProgress], None]) -> None:
        finished = self._folder.finished(part.index)
        if finished and finished[-1].is_last:
            return
        position = finished[-1].position if finished else 0
        finished_rows = sum(counts.rows for shard in finished for counts in shard.sources)
        writer = self._new_writer(part, len(finished))
        try:
            for file_range in part.ranges:
                source = self._config.sources[file_range.source]
                text_bytes = rows = first_row = 0
                for batch in read_file_range(source, file_range, position, self._config.rules):
                    if batch.rejected and self._config.on_bad_line == "fail":
                        self._fail(file_range, batch.rejected[0], finished_rows)
                    report(self._write(writer, file_range, batch, first_row))
                    text_bytes += sum(len(text) for column in batch.texts for text in column)
                    rows += batch.num_rows
                    if batch.position is not None and text_bytes >= self._config.chunk_bytes:
                        writer.finish(is_last=False, position=batch.position)
                        writer = self._new_writer(part, writer.chunk + 1)
                        text_bytes, first_row = 0, rows
                if file_range.source in part.whole_sources:
                    writer.end_source(file_range.source, sha256_of(source.path))
            writer.finish(is_last=True, position=0)
        finally:
            with contextlib.suppress(OSError):  # a full disk, which was reported already
                writer.close()

    def _hash_source(self, number: int) -> None:
        """Write the SHA-256 of a file that several parts read."""
        path = source_hash_path(self._config.folder, number)
        if not path.is_file():
            write_text(path, sha256_of(self._config.sources[number].path))

    def _new_writer(self, part: InputPart, chunk: int) -> ShardWriter:
        keep = self._config.on_bad_line == "quarantine"
        return ShardWriter(self._folder, part.index, chunk, keep_rejected=keep)

    def _write(
        self, writer: ShardWriter, file_range: FileRange, batch: TextBatch, first_row: int
    ) -> WorkerProgress:
        rejected = [replace(record, row=record.row - first_row) for record in batch.rejected]
        batches = [self._ids_of(column) for column in batch.texts]
        writer.add(file_range.source, batches, rejected)
        writer.end_rows(file_range.source, batch.num_rows)
        return WorkerProgress(
            source=file_range.source,
            source_bytes=batch.source_bytes,
            documents=len(batch.texts[0]),
            tokens=sum(len(token_batch.ids) for token_batch, _ in batches),
            rejected=len(rejected),
        )

    def _ids_of(self, texts: Sequence[str]) -> tuple[TokenBatch, int]:
        """Return the ids of documents, and the number of end-of-document tokens inside them."""
        settings = self._config.settings
        batch = self._backend.encode(texts)
        if self._backend is not self._reference:
            self._check(texts, batch)
        eod_inside = int(np.count_nonzero(batch.ids == settings.eod))
        return add_ids(batch, settings), eod_inside

    def _check(self, texts: Sequence[str], batch: TokenBatch) -> None:
        """Compare every n-th document with the reference: all ids, or a window of a long document.

        The position of the window changes from document to document.
        """
        index = self._until_check - 1
        ends = np.cumsum(batch.lengths)
        while index < len(texts):
            text, end = texts[index], int(ends[index])
            if len(text) <= COMPARED_CHARS:
                ids = batch.ids[end - int(batch.lengths[index]) : end]
                compare_ids(self._backend.name, ids, self._reference, text)
            else:
                first = self._window * COMPARED_CHARS % len(text)
                first = min(first, len(text) - COMPARED_CHARS)
                compare_backends(
                    self._backend, self._reference, [text[first : first + COMPARED_CHARS]]
                )
                self._window += 1
            index += self._config.check_every
        self._until_check = index - len(texts) + 1

    def _fail(self, file_range: FileRange, record: Rejection, finished_rows: int) -> None:
        """Raise an error that names the line; a resumed stream has rows in finished shards."""
        source = self._config.sources[file_range.source]
        row = rows_before(source, file_range) + finished_rows + record.row + 1
        unit = {"parquet": "row", "arrow": "row", "txt": "document"}.get(source.format, "line")
        raise DataError(
            f"{source.path}, {unit} {row:,}: {record.explanation}. Fix it, or leave such lines out "
            "with `--on-bad-line skip`, or with `quarantine`, which keeps them in a file. Finished "
            "shards are kept: the same command resumes from them."
        )
