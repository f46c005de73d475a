"""Shards: finished parts of the input on disk, as token ids and counts.

A shard consists of ``NAME.KEY.bin`` (ids) and ``NAME.KEY.len`` (int32, tokens of each document) for
each JSON key; ``NAME.rejected`` (lines of JSON) if there are rejected lines; and ``NAME.json``,
which is written last: a shard that has it is complete.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megapoly.data.preprocess.text_extraction import Rejection
from megapoly.data.preprocess.tokenization import TokenBatch
from megapoly.platform.files import full_disk_explained, write_text

LENGTH_DTYPE = np.dtype("<i4")
# In each shard; the file of rejected lines holds all of them.
_EXAMPLES = 100


@dataclass
class KeyCounts:
    """Counts of one JSON key of a shard.

    Args:
        documents: documents.
        sequences: documents that have tokens.
        tokens: tokens.
        highest_token_id: highest id; -1 if there are no tokens.
        eod_inside: end-of-document tokens inside texts.
    """

    documents: int = 0
    sequences: int = 0
    tokens: int = 0
    highest_token_id: int = -1
    eod_inside: int = 0

    def add(self, other: KeyCounts) -> None:
        """Add other counts to these."""
        self.documents += other.documents
        self.sequences += other.sequences
        self.tokens += other.tokens
        self.highest_token_id = max(self.highest_token_id, other.highest_token_id)
        self.eod_inside += other.eod_inside


@dataclass
class SourceCounts:
    """Counts of one file in a shard.

    Args:
        source: index of the file in the list of source files.
        rows: lines or rows, including blank and rejected ones.
        documents: documents.
        rejected: rejected lines or rows.
        tokens: tokens of all keys.
        sha256: hash of the file, if this part read all of it; otherwise empty.
    """

    source: int
    rows: int = 0
    documents: int = 0
    rejected: int = 0
    tokens: int = 0
    sha256: str = ""


@dataclass
class TokenShard:
    """Description of a finished shard, the content of ``NAME.json``.

    Args:
        part: number of the part of the input.
        chunk: number of the shard in a part that is a stream; 0 for other parts.
        is_last: whether it is the last shard of the part.
        position: where the stream resumes; 0 for the last shard.
        keys: counts of each JSON key.
        sources: counts of each file, in order.
        reasons: number of rejected lines by reason.
        examples: the first rejected lines: source, row (from 0, in this shard), explanation.
    """

    part: int
    chunk: int
    is_last: bool
    position: int
    keys: list[KeyCounts]
    sources: list[SourceCounts]
    reasons: dict[str, int] = field(default_factory=dict)
    examples: list[dict[str, Any]] = field(default_factory=list)


class ShardFolder:
    """The shards of one run of the preprocessor.

    Args:
        folder: folder of the shards.
        keys: JSON keys, one pair of token files each.
    """

    def __init__(self, folder: Path, keys: Sequence[str]):
        self.folder = folder
        self.keys = list(keys)

    def path(self, part: int, chunk: int, ending: str) -> Path:
        """Return a path; ``ending`` is ``json``, ``rejected``, ``0.bin``, ``0.len``, ..."""
        return self.folder / f"{part:06d}-{chunk:04d}.{ending}"

    def finished(self, part: int) -> list[TokenShard]:
        """Return the complete shards of a part, from the first one."""
        shards: list[TokenShard] = []
        while shard := self._read(part, len(shards)):
            shards.append(shard)
            if shard.is_last:
                break
        return shards

    def _read(self, part: int, chunk: int) -> TokenShard | None:
        path = self.path(part, chunk, "json")
        if not path.is_file():
            return None
        content = json.loads(path.read_text())
        content["keys"] = [KeyCounts(**counts) for counts in content["keys"]]
        content["sources"] = [SourceCounts(**counts) for counts in content["sources"]]
        shard = TokenShard(**content)
        for i, counts in enumerate(shard.keys):
            lengths, ids = (self.path(part, chunk, f"{i}.{ending}") for ending in ("len", "bin"))
            if not (lengths.is_file() and ids.is_file()):
                return None
            if lengths.stat().st_size != counts.documents * LENGTH_DTYPE.itemsize:
                return None
        return shard


class ShardWriter:
    """Writes one shard.

    Args:
        folder: the shards.
        part: as in :class:`TokenShard`.
        chunk: as in :class:`TokenShard`.
        keep_rejected: also write the content of rejected lines.
    """

    def __init__(self, folder: ShardFolder, part: int, chunk: int, *, keep_rejected: bool):
        self.chunk = chunk
        self._folder, self._part = folder, part
        self._keep_rejected = keep_rejected
        self._streams: dict[str, BinaryIO] = {}
        self._keys = [KeyCounts() for _ in folder.keys]
        self._sources: list[SourceCounts] = []
        self._reasons: Counter[str] = Counter()
        self._examples: list[dict[str, Any]] = []

    def _stream(self, ending: str) -> BinaryIO:
        if ending not in self._streams:
            path = self._folder.path(self._part, self.chunk, ending)
            self._streams[ending] = path.open("wb")
        return self._streams[ending]

    def add(
        self, source: int, batches: Sequence[tuple[TokenBatch, int]], rejected: Sequence[Rejection]
    ) -> None:
        """Write the documents of some consecutive rows.

        Args:
            source: index of their file.
            batches: for each JSON key the ids, and the number of end-of-document tokens in texts.
            rejected: rows without a valid text, numbered from the first row of the file in this
                shard.

        Raises:
            DataError: the disk is full.
        """
        counts = self._counts_of(source)
        counts.documents += len(batches[0][0].lengths)
        counts.rejected += len(rejected)
        counts.tokens += sum(len(batch.ids) for batch, _ in batches)
        with full_disk_explained(self._folder.path(self._part, self.chunk, "0.bin")):
            for i, (batch, eod_inside) in enumerate(batches):
                self._stream(f"{i}.bin").write(batch.ids.tobytes())
                self._stream(f"{i}.len").write(batch.lengths.astype(LENGTH_DTYPE).tobytes())
                self._keys[i].add(
                    KeyCounts(
                        documents=len(batch.lengths),
                        sequences=int(np.count_nonzero(batch.lengths)),
                        tokens=len(batch.ids),
                        highest_token_id=int(batch.ids.max()) if len(batch.ids) else -1,
                        eod_inside=eod_inside,
                    )
                )
            for record in rejected:
                self._reject(source, record)

    def end_rows(self, source: int, num_rows: int) -> None:
        """Count rows of a file as processed."""
        self._counts_of(source).rows += num_rows

    def end_source(self, source: int, sha256: str) -> None:
        """Record the hash of a file that was read to its end."""
        self._counts_of(source).sha256 = sha256

    def finish(self, *, is_last: bool, position: int) -> TokenShard:
        """Flush everything to the disk and write ``NAME.json``.

        Raises:
            DataError: the disk is full.
        """
        with full_disk_explained(self._folder.path(self._part, self.chunk, "0.bin")):
            for i in range(len(self._keys)):
                self._stream(f"{i}.bin")
                self._stream(f"{i}.len")
            for stream in self._streams.values():
                stream.flush()
                os.fsync(stream.fileno())
            self.close()
        shard = TokenShard(
            self._part,
            self.chunk,
            is_last,
            position,
            self._keys,
            self._sources,
            dict(self._reasons),
            self._examples,
        )
        path = self._folder.path(self._part, self.chunk, "json")
        write_text(path, json.dumps(asdict(shard)))
        return shard

    def close(self) -> None:
        """Close the files; without :meth:`finish` they do not form a shard."""
        with contextlib.ExitStack() as stack:
            for stream in self._streams.values():
                stack.callback(stream.close)

    def _counts_of(self, source: int) -> SourceCounts:
        if not self._sources or self._sources[-1].source != source:
            self._sources.append(SourceCounts(source))
        return self._sources[-1]

    def _reject(self, source: int, record: Rejection) -> None:
        self._reasons[record.reason] += 1
        entry = {"source": source, "row": record.row, "reason": record.explanation}
        if len(self._examples) < _EXAMPLES:
            self._examples.append(entry)
        if self._keep_rejected:
            line = json.dumps(entry | {"bytes": record.size_bytes} | _content_entry(record.content))
            self._stream("rejected").write(line.encode() + b"\n")


def _content_entry(content: bytes | None) -> dict[str, str]:
    """Return the content of a rejected line as JSON values."""
    if content is None:
        return {}
    try:
        return {"content": content.decode("utf-8")}
    except UnicodeDecodeError:
        return {"content_base64": base64.b64encode(content).decode()}


def length_chunks(
    folder: ShardFolder, shards: Sequence[TokenShard], key: int
) -> Iterator[np.ndarray]:
    """Yield the tokens of every document of one JSON key, a chunk for each shard."""
    for shard in shards:
        path = folder.path(shard.part, shard.chunk, f"{key}.len")
        yield np.fromfile(path, LENGTH_DTYPE)


def source_hash_path(folder: Path, source: int) -> Path:
    """Return the path of the SHA-256 of a file that several parts read."""
    return folder / f"source-{source:06d}.sha256"
