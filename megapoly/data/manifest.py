"""``PREFIX.manifest.json``: where token files came from, and their sizes and hashes.

One manifest describes all pairs of one run of ``megapoly preprocess``: for each JSON key
``PREFIX_KEY_document.bin`` and ``.idx``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megapoly.errors import DataError
from megapoly.platform.files import write_text

FORMAT_VERSION = 1


@dataclass(frozen=True)
class SourceRecord:
    """An input file.

    Args:
        path: as the user or a pattern named it.
        format: ``jsonl``, ``jsonl.gz``, ``jsonl.zst``, ``parquet``, ``arrow``, ``txt``, or ``pair``
            for token files that were merged.
        size_bytes: of the file on disk, compressed or not.
        sha256: of the same bytes.
        documents: documents taken from it.
        rejected: lines, rows or documents that were left out.
        modified_ns: time of its last change; 0: unknown.
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
        name: prefix without its folder.
        dtype: numpy's name for the type of a token id.
        documents: documents.
        sequences: sequences; an empty document has none.
        tokens: tokens, including end-of-document tokens.
        highest_token_id: highest id; -1 if there are no tokens.
        eod_inside: end-of-document tokens inside documents, whose text names the token; -1:
            unknown.
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
    """The tokenizer that turned text into ids.

    Args:
        type: Megatron's name for it, such as ``HuggingFaceTokenizer``.
        path: file that it was read from.
        sha256: of its ``tokenizer.json``, and of tokens that only the files beside it name.
        vocab_size: rows that an embedding needs: the highest id plus one.
        eod: id that ends a document.
        appends_eod: whether every document ends with it.
        prefix: ids before every document, such as a beginning-of-sequence token.
        suffix: ids after every document, before ``eod``.
        backend: name and version of the library.
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
        total: number left out.
        by_reason: number for each reason.
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
        format_version: version of the file format.
        megapoly_version: version of megapoly that wrote the file.
        tokenizer: the tokenizer; null if unknown, for a merged pair.
        arguments: arguments of the command.
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
        """Return the record of a pair; None if the manifest does not describe it."""
        return next((pair for pair in self.pairs if pair.name == name), None)


def manifest_path(prefix: str | Path) -> Path:
    """Return ``PREFIX.manifest.json``."""
    return Path(f"{prefix}.manifest.json")


def write_manifest(prefix: str | Path, manifest: Manifest) -> Path:
    """Write ``PREFIX.manifest.json`` atomically and return its path."""
    path = manifest_path(prefix)
    write_text(path, json.dumps(asdict(manifest), indent=1, ensure_ascii=False) + "\n")
    return path


def read_manifest(path: Path) -> Manifest:
    """Read a manifest.

    Raises:
        DataError: it cannot be read, has another format version, or an entry is missing.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["format_version"]
        if version != FORMAT_VERSION:
            raise DataError(
                f"`{path}` has format version {version}; this megapoly reads {FORMAT_VERSION}. Use "
                "the version that wrote it, or create the token files again."
            )
        return _from_json(content)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"`{path}` is not a valid manifest ({type(error).__name__}: {error}). Create the token "
            "files again, or delete it to use them without a manifest."
        ) from error


def find_manifest(prefix: str | Path) -> Path | None:
    """Return the path of the manifest that describes a pair; None if there is none next to it.

    A pair is named ``PREFIX_KEY_document``, its manifest ``PREFIX.manifest.json``. A key may
    contain underscores, so every beginning of the name that ends before an underscore is tried.

    Args:
        prefix: path of the pair without ``.bin`` and ``.idx``.

    Raises:
        DataError: as :func:`read_manifest`.
    """
    path = Path(prefix)
    for name in manifest_names(path.name):
        candidate = path.with_name(name)
        if candidate.is_file() and read_manifest(candidate).pair(path.name) is not None:
            return candidate
    return None


def manifest_names(pair: str) -> list[str]:
    """Return the names that the manifest of a pair may have, the longest first.

    Args:
        pair: name of the pair, a prefix without its folder.
    """
    parts = pair.split("_")
    lengths = range(len(parts), 0, -1)
    return [manifest_path("_".join(parts[:length])).name for length in lengths]


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
