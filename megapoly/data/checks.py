"""Whether token files are whole and fit the model, before a model is built.

Sizes are compared with the index by :func:`megapoly.data.token_files.open_token_file`; here with
the manifest, if there is one, and token ids with the vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megapoly.data.files import write_text
from megapoly.data.manifest import PairRecord, find_manifest, read_manifest
from megapoly.data.token_files import TokenFile, open_token_file, pair_paths
from megapoly.errors import DataError

_BLOCKS = 64
_BLOCK_BYTES = 1 << 20


def check_token_files(
    prefixes: Sequence[str | Path],
    *,
    min_tokens: int,
    tokenizer: str,
    vocab_size: int,
    cache_dir: Path,
) -> tuple[list[TokenFile], list[str]]:
    """Open pairs, check them against their manifests and their token ids against the vocabulary.

    The largest id is the manifest's. Without a manifest it is that of a sample, 64 blocks of a
    mebibyte spread evenly over the file (all of a smaller one), which can miss an id: every sample
    is checked again when it is read. It is kept in ``cache_dir``, so that one process reads it.

    Args:
        prefixes: without ``.bin`` and ``.idx``.
        min_tokens: that one sample needs.
        tokenizer: fingerprint of the run's.
        vocab_size: token ids that the model knows.
        cache_dir: where what was read is kept.

    Returns:
        The pairs; and what the user should know that is no error: a sentence for each pair whose
        manifest names another tokenizer.

    Raises:
        DataError: a file is missing, damaged or too short, sizes or index are not the manifest's,
            or an id is beyond the vocabulary.
    """
    token_files = [open_token_file(prefix) for prefix in prefixes]
    warnings = []
    for token_file in token_files:
        if token_file.num_tokens < min_tokens:
            raise DataError(
                f"A token file must have at least {min_tokens} tokens, `training.seq_length` and "
                f"one label more (2 for validation); `{token_file.prefix}` has "
                f"{token_file.num_tokens}. Use more text or a smaller `training.seq_length`."
            )
        highest, says, found = _highest_id(token_file, tokenizer, cache_dir)
        if highest >= vocab_size:
            raise DataError(beyond_vocabulary(token_file, highest, vocab_size, says))
        warnings += found
    return token_files, warnings


def _highest_id(
    token_file: TokenFile, tokenizer: str, cache_dir: Path
) -> tuple[int, str, list[str]]:
    """Largest id, who says so, and what the user should know."""
    path = find_manifest(token_file.prefix)
    if path is None:
        return _sampled_highest_id(token_file, cache_dir), "holds", []
    manifest = read_manifest(path)
    record = manifest.pair(Path(token_file.prefix).name)
    assert record is not None, "find_manifest looked"
    _check_record(token_file, record, path)
    warnings = []
    if manifest.tokenizer is not None:
        warnings = _tokenizer_warnings(token_file, manifest.tokenizer.sha256, tokenizer)
    return record.highest_token_id, f"(by its manifest {path}) holds", warnings


def beyond_vocabulary(
    token_file: TokenFile, highest: int, vocab_size: int, source: str = "holds"
) -> str:
    """Message about a token id that the model does not know."""
    return (
        f"Token ids must be below the size of the vocabulary ({vocab_size}); "
        f"`{token_file.prefix}.bin` {source} {highest}. Name the tokenizer that made the file as "
        "`data.tokenizer`, or raise `model.vocab_size`."
    )


def _check_record(token_file: TokenFile, record: PairRecord, path: Path) -> None:
    bin_path, idx_path = pair_paths(token_file.prefix)
    for file, expected in ((bin_path, record.bin_bytes), (idx_path, record.idx_bytes)):
        actual = file.stat().st_size
        if actual != expected:
            raise DataError(
                f"`{file}` has {actual} bytes, but its manifest `{path}` says {expected}. {_REMEDY}"
            )
    if token_file.idx_sha256 != record.idx_sha256:
        raise DataError(
            f"`{idx_path}` has SHA-256 {token_file.idx_sha256}, but its manifest `{path}` says "
            f"{record.idx_sha256}. {_REMEDY}"
        )


_REMEDY = (
    "It was cut off or replaced after the manifest was written: copy or make the files again, or "
    "delete the manifest to go without one."
)


def _tokenizer_warnings(token_file: TokenFile, theirs: str, ours: str) -> list[str]:
    if theirs == ours:
        return []
    return [
        f"`{token_file.prefix}` was made with another tokenizer.json than `data.tokenizer` names "
        f"(SHA-256 {theirs[:12]}.. by its manifest, {ours[:12]}.. here); its ids may mean other "
        "tokens"
    ]


def _sampled_highest_id(token_file: TokenFile, cache_dir: Path) -> int:
    kept = cache_dir / "token_ids" / f"{token_file.fingerprint}.json"
    if kept.is_file():
        return int(json.loads(kept.read_text())["highest_sampled_id"])
    highest = _highest_id_of_blocks(token_file)
    write_text(kept, json.dumps({"highest_sampled_id": highest}) + "\n")
    return highest


def _highest_id_of_blocks(token_file: TokenFile) -> int:
    if token_file.num_tokens == 0:
        return -1
    tokens = np.memmap(f"{token_file.prefix}.bin", token_file.dtype, mode="r")
    length = _BLOCK_BYTES // token_file.dtype.itemsize
    if len(tokens) <= _BLOCKS * length:
        starts = np.arange(0, len(tokens), length)
    else:  # the first and the last block are at the ends
        starts = np.linspace(0, len(tokens) - length, _BLOCKS).astype(np.int64)
    return max(int(tokens[start : start + length].max()) for start in starts)
