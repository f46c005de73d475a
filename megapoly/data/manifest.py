"""``PREFIX.manifest.json``: where token files came from, and what they must be byte for byte.

One manifest describes all pairs of one run of ``megapoly preprocess``: one for each JSON key,
``PREFIX_KEY_document.bin`` and ``.idx``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megapoly.data.files import write_text
from megapoly.errors import DataError

FORMAT_VERSION = 1


@dataclass(frozen=True)
class SourceRecord:
    """An input file.

    Args:
        path: as it was found.
        format: ``jsonl``, ``jsonl.gz``, ``jsonl.zst``, ``parquet``, ``arrow``, ``txt``, or ``pair``
            for token files that were merged.
        size_bytes: of the file as it lies on disk.
        sha256: of the same bytes.
        documents: taken from it.
        rejected: lines, rows or documents of it that were not.
        modified_ns: time of its last change; 0: not known.
    """

    path: str
    format: str
    size_bytes: int
    sha256: str
    documents: int
    rejected: int
    modified_ns: int = 0


@dataclass(frozen=True)
class PairRecord:
    """A ``.bin``/``.idx`` pair.

    Args:
        name: of the pair, without folder and ending.
        dtype: numpy's name of the type of a token.
        documents: documents.
        sequences: sequences; an empty document has none.
        tokens: tokens, ends of documents included.
        highest_token_id: largest id; -1 without a token.
        eod_inside: ends of document that stand inside documents, because their text names the
            token; -1: not known.
        tokens_per_document: ``min``, ``p01``, ``p10``, ``p25``, ``p50``, ``p75``, ``p90``, ``p99``,
            ``max`` (lower nearest rank) and ``mean``.
        bin_bytes: size of ``.bin``.
        bin_sha256: of ``.bin``.
        idx_bytes: size of ``.idx``.
        idx_sha256: of ``.idx``.
    """

    name: str
    dtype: str
    documents: int
    sequences: int
    tokens: int
    highest_token_id: int
    eod_inside: int
    tokens_per_document: dict[str, float]
    bin_bytes: int
    bin_sha256: str
    idx_bytes: int
    idx_sha256: str


@dataclass(frozen=True)
class TokenizerRecord:
    """What turned text into ids.

    Args:
        type: Megatron's name of it, such as ``HuggingFaceTokenizer``.
        path: where it was read.
        sha256: of its ``tokenizer.json``.
        vocab_size: ids that an embedding needs: the highest and one.
        eod: id that ends a document.
        appends_eod: whether every document ends with it.
        prefix: ids before every document, such as a beginning of sentence.
        suffix: ids after every document, before ``eod``.
        backend: library and version that did the work.
    """

    type: str
    path: str
    sha256: str
    vocab_size: int
    eod: int
    appends_eod: bool
    prefix: list[int]
    suffix: list[int]
    backend: str


@dataclass(frozen=True)
class RejectedRecord:
    """Lines, rows and documents that were left out.

    Args:
        policy: ``--on-bad-line``.
        total: how many.
        by_reason: how many for each reason.
        examples: the first of them, ``{"source", "line", "reason"}``.
    """

    policy: str
    total: int = 0
    by_reason: dict[str, int] = field(default_factory=dict)
    examples: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Manifest:
    """Content of a manifest.

    Args:
        format_version: of this file.
        megapoly_version: that wrote it.
        tokenizer: what turned text into ids; null if that is not known of a merged pair.
        arguments: of the command.
        sources: input files, in order.
        pairs: what was written.
        rejected: what was left out.
    """

    format_version: int
    megapoly_version: str
    tokenizer: TokenizerRecord | None
    arguments: dict[str, Any]
    sources: list[SourceRecord]
    pairs: list[PairRecord]
    rejected: RejectedRecord

    def pair(self, name: str) -> PairRecord | None:
        """The pair of that name, if the manifest describes it."""
        return next((pair for pair in self.pairs if pair.name == name), None)


def manifest_path(prefix: str | Path) -> Path:
    """``PREFIX.manifest.json``."""
    return Path(f"{prefix}.manifest.json")


def write_manifest(prefix: str | Path, manifest: Manifest) -> Path:
    """Write ``PREFIX.manifest.json``; whole or not at all."""
    path = manifest_path(prefix)
    write_text(path, json.dumps(asdict(manifest), indent=1, ensure_ascii=False) + "\n")
    return path


def read_manifest(path: Path) -> Manifest:
    """Read a manifest.

    Raises:
        DataError: it cannot be read, has another format version, or lacks something.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["format_version"]
        if version != FORMAT_VERSION:
            raise DataError(
                f"`{path}` has format version {version}; this megapoly reads {FORMAT_VERSION}. Use "
                "the version that wrote it, or make the token files again."
            )
        return _from_json(content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"`{path}` is not a manifest that can be read ({type(error).__name__}: {error}). Make "
            "the token files again, or delete it to go without one."
        ) from error


def find_manifest(prefix: str | Path) -> Path | None:
    """The manifest that describes a pair, if there is one beside it.

    A pair is named ``PREFIX_KEY_document``, its manifest ``PREFIX.manifest.json``; a key may have
    underscores of its own, so every beginning of the name that ends before one is looked at.

    Args:
        prefix: of the pair, without ``.bin`` and ``.idx``.

    Raises:
        DataError: as :func:`read_manifest`.
    """
    path = Path(prefix)
    words = path.name.split("_")
    for length in range(len(words), 0, -1):
        candidate = manifest_path(path.with_name("_".join(words[:length])))
        if candidate.is_file() and read_manifest(candidate).pair(path.name) is not None:
            return candidate
    return None


def _from_json(content: Mapping[str, Any]) -> Manifest:
    tokenizer = content["tokenizer"]
    return Manifest(
        **dict(content)
        | {
            "tokenizer": tokenizer and TokenizerRecord(**tokenizer),
            "sources": [SourceRecord(**source) for source in content["sources"]],
            "pairs": [PairRecord(**pair) for pair in content["pairs"]],
            "rejected": RejectedRecord(**content["rejected"]),
        }
    )
