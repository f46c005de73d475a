"""What the preprocessor is told, whatever tells it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

# Bytes of a part: what an interruption can cost each worker, and what small inputs are cut into so
# that every worker has something to do. A function of the input alone: another number of workers
# goes on with the same parts.
MAX_PART_BYTES = 64 << 20
MIN_PART_BYTES = 1 << 20
PARTS_OF_SMALL_INPUT = 16
CHUNK_BYTES = 256 << 20


@dataclass(frozen=True)
class PreprocessOptions:
    """Options of ``megapoly preprocess``; the names are Megatron's where it has one.

    Args:
        input: files, patterns and folders.
        output_prefix: of the pairs ``PREFIX_KEY_document`` and of ``PREFIX.manifest.json``.
        json_keys: keys of the JSON objects, or columns of tables; a pair for each.
        tokenizer_type: ``HuggingFaceTokenizer`` or ``GPT2BPETokenizer``.
        tokenizer_model: a ``tokenizer.json`` or its folder; null: the built-in one.
        vocab_file: of a ``GPT2BPETokenizer``.
        merge_file: of a ``GPT2BPETokenizer``.
        append_eod: end every document with the end-of-document token.
        include_special_tokens: add what the tokenizer's post-processor adds.
        split_special_tokens: take the name of a special token in a text as text.
        keep_empty: an empty text is an empty document, as in Megatron's tool, not a bad line.
        workers: processes.
        tokenizer_backend: ``auto``, ``gigatoken`` or ``tokenizers``.
        check_every: every so many documents of a worker are compared with ``tokenizers``.
        on_bad_line: ``fail``, ``skip`` or ``quarantine``.
        max_document_mib: longest line of JSON, or text of a table's row or a text file.
        part_bytes: bytes of the input that a worker does at a time; null: by the input's size.
        chunk_bytes: text of a compressed file that makes one shard.
        restart: drop finished shards of an interrupted run.
        overwrite: replace token files that exist.
    """

    input: tuple[str, ...]
    output_prefix: Path
    json_keys: tuple[str, ...] = ("text",)
    tokenizer_type: str = "HuggingFaceTokenizer"
    tokenizer_model: str | None = None
    vocab_file: str | None = None
    merge_file: str | None = None
    append_eod: bool = False
    include_special_tokens: bool = True
    split_special_tokens: bool = False
    keep_empty: bool = False
    workers: int = os.cpu_count() or 1
    tokenizer_backend: Literal["auto", "gigatoken", "tokenizers"] = "auto"
    check_every: int = 500
    on_bad_line: Literal["fail", "skip", "quarantine"] = "fail"
    max_document_mib: float = 16.0
    part_bytes: int | None = None
    chunk_bytes: int = CHUNK_BYTES
    restart: bool = False
    overwrite: bool = False

    def pair_prefix(self, key: str) -> Path:
        """Prefix of the pair of one key."""
        return Path(f"{self.output_prefix}_{key}_document")

    @property
    def shard_folder(self) -> Path:
        """Where finished work is kept until all is done."""
        return Path(f"{self.output_prefix}.shards")

    @property
    def quarantine_path(self) -> Path:
        """The file of rejected lines."""
        return Path(f"{self.output_prefix}.quarantine.jsonl")

    def part_bytes_of(self, input_bytes: int) -> int:
        """Bytes of a part, for an input of some size."""
        wanted = input_bytes // PARTS_OF_SMALL_INPUT
        return self.part_bytes or min(max(wanted, MIN_PART_BYTES), MAX_PART_BYTES)

    def arguments(self) -> dict[str, Any]:
        """What decides about the bytes that are written, for the manifest and the plan."""
        return {
            "input": list(self.input),
            "json_keys": list(self.json_keys),
            "append_eod": self.append_eod,
            "include_special_tokens": self.include_special_tokens,
            "split_special_tokens": self.split_special_tokens,
            "keep_empty": self.keep_empty,
            "on_bad_line": self.on_bad_line,
            "max_document_mib": self.max_document_mib,
        }
