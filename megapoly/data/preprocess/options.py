"""Options of the preprocessor."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

# Size of a part: the most work that an interruption can cost a worker, and a size that gives every
# worker a part of a small input. It depends on the input alone, so that a run with another number
# of workers can resume with the same parts.
MAX_PART_BYTES = 64 << 20
MIN_PART_BYTES = 1 << 20
PARTS_OF_SMALL_INPUT = 16
CHUNK_BYTES = 256 << 20


@dataclass(frozen=True)
class PreprocessOptions:
    """Options of ``megapoly preprocess``, with Megatron's names where they exist.

    Args:
        input: files, patterns and folders.
        output_prefix: prefix of the pairs ``PREFIX_KEY_document`` and ``PREFIX.manifest.json``.
        json_keys: keys of the JSON objects, or columns of tables; one pair for each.
        tokenizer_type: ``HuggingFaceTokenizer`` or ``GPT2BPETokenizer``.
        tokenizer_model: a ``tokenizer.json`` or its folder; None: the built-in tokenizer.
        vocab_file: ``vocab.json`` of a ``GPT2BPETokenizer``.
        merge_file: ``merges.txt`` of a ``GPT2BPETokenizer``.
        append_eod: end every document with the end-of-document token.
        include_special_tokens: add the ids of the tokenizer's post-processor.
        split_special_tokens: treat the name of a special token in a text as text.
        keep_empty: make an empty text an empty document, as in Megatron's tool, not a bad line.
        workers: number of processes.
        tokenizer_backend: ``auto``, ``gigatoken`` or ``tokenizers``.
        check_every: compare every n-th document of a worker with ``tokenizers``.
        on_bad_line: ``fail``, ``skip`` or ``quarantine``.
        max_document_mib: longest line of JSON, or text of a row or text file.
        part_bytes: bytes of the input in a part; None: by the size of the input.
        chunk_bytes: text of a compressed file in one shard.
        restart: delete finished shards of an interrupted run.
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
        """Return the prefix of the pair of one key."""
        return Path(f"{self.output_prefix}_{key}_document")

    @property
    def shard_folder(self) -> Path:
        """Folder of finished shards until the token files are complete."""
        return Path(f"{self.output_prefix}.shards")

    @property
    def quarantine_path(self) -> Path:
        """File of rejected lines."""
        return Path(f"{self.output_prefix}.quarantine.jsonl")

    def part_bytes_of(self, input_bytes: int) -> int:
        """Return the size of a part for the size of the input."""
        target = input_bytes // PARTS_OF_SMALL_INPUT
        return self.part_bytes or min(max(target, MIN_PART_BYTES), MAX_PART_BYTES)

    def arguments(self) -> dict[str, Any]:
        """Return the options that determine the bytes, for the manifest and the plan."""
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
