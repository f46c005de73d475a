"""Check that token files are complete and fit the model, before a model is built.

:func:`megapoly.data.token_files.open_token_file` compares sizes with the index; this module
compares them with the manifest, if it exists, and token ids with the vocabulary.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megapoly.data.cache_files import read_cached_object
from megapoly.data.manifest import PairRecord, find_manifest, read_manifest
from megapoly.data.token_files import TokenFile, negative_id, open_token_file, pair_paths
from megapoly.errors import DataError
from megapoly.platform.files import write_text

logger = logging.getLogger(__name__)

_BLOCKS = 64
_BLOCK_BYTES = 1 << 20

Extremes = tuple[int, int]  # the lowest and the highest token id


def check_token_files(
    prefixes: Sequence[str | Path],
    *,
    min_tokens: int,
    tokenizer: str,
    vocab_size: int,
    cache_dir: Path,
) -> tuple[list[TokenFile], list[str]]:
    """Open pairs, check them against their manifests and their token ids against the vocabulary.

    The highest id comes from the manifest; what megapoly writes has no negative ids. Without a
    manifest the lowest and the highest come from 64 blocks of one mebibyte, spread evenly over the
    file (all of a smaller file). This can miss an id, so every sample is checked again when it is
    read. The result is kept in ``cache_dir``, so that one process reads the blocks.

    Args:
        prefixes: paths without ``.bin`` and ``.idx``.
        min_tokens: tokens that one sample needs.
        tokenizer: fingerprint of the run's tokenizer.
        vocab_size: size of the model's vocabulary.
        cache_dir: folder for the lowest and highest ids.

    Returns:
        The pairs, and warnings: a sentence for each pair whose manifest names another tokenizer.

    Raises:
        DataError: a file is missing, damaged or too short, its size or index differs from the
            manifest, or an id is negative or not below ``vocab_size``.
    """
    token_files = [open_token_file(prefix) for prefix in prefixes]
    warnings = []
    for token_file in token_files:
        if token_file.num_tokens < min_tokens:
            raise DataError(
                f"A token file must have at least {min_tokens} tokens, `training.seq_length` plus "
                f"one label (2 for validation); `{token_file.prefix}` has "
                f"{token_file.num_tokens}. Use more text or a smaller `training.seq_length`."
            )
        extremes, origin, found = _extreme_ids(token_file, tokenizer, cache_dir)
        if (problem := outside_vocabulary(token_file, extremes, vocab_size, origin)) is not None:
            raise DataError(problem)
        warnings += found
    return token_files, warnings


def _extreme_ids(
    token_file: TokenFile, tokenizer: str, cache_dir: Path
) -> tuple[Extremes, str, list[str]]:
    """Return the lowest and the highest id, where they come from, and warnings."""
    path = find_manifest(token_file.prefix)
    if path is None:
        return _sampled_extremes(token_file, cache_dir), "holds", []
    manifest = read_manifest(path)
    record = manifest.pair(Path(token_file.prefix).name)
    assert record is not None, "find_manifest looked"
    _check_record(token_file, record, path)
    warnings = []
    if manifest.tokenizer is not None:
        warnings = _tokenizer_warnings(token_file, manifest.tokenizer.sha256, tokenizer)
    highest = record.highest_token_id
    return (min(0, highest), highest), f"(according to its manifest {path}) holds", warnings


def outside_vocabulary(
    token_file: TokenFile, extremes: Extremes, vocab_size: int, origin: str = "holds"
) -> str | None:
    """Return the message about a token id outside the model's vocabulary; None if all are inside.

    Args:
        token_file: the pair.
        extremes: its lowest and its highest id.
        vocab_size: size of the model's vocabulary.
        origin: verb of the message, with where the ids come from.
    """
    lowest, highest = extremes
    if lowest < 0:
        return negative_id(f"{token_file.prefix}.bin", lowest, token_file.dtype)
    if highest < vocab_size:
        return None
    return (
        f"Token ids must be below the size of the vocabulary ({vocab_size}); "
        f"`{token_file.prefix}.bin` {origin} {highest}. Set `data.tokenizer` to the tokenizer that "
        "made the file, or raise `model.vocab_size`."
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
    "It was truncated or replaced after the manifest was written: copy or create the files again, "
    "or delete the manifest to use them without it."
)


def _tokenizer_warnings(token_file: TokenFile, theirs: str, ours: str) -> list[str]:
    if theirs == ours:
        return []
    return [
        f"`{token_file.prefix}` was made with another tokenizer.json than `data.tokenizer` "
        f"(SHA-256 {theirs[:12]}.. in its manifest, {ours[:12]}.. here); its ids may mean other "
        "tokens"
    ]


def _sampled_extremes(token_file: TokenFile, cache_dir: Path) -> Extremes:
    kept = cache_dir / "token_ids" / f"{token_file.fingerprint}.json"
    found = read_cached_object(kept)
    lowest, highest = found.get("lowest_sampled_id"), found.get("highest_sampled_id")
    if not (isinstance(lowest, int) and isinstance(highest, int)):
        if kept.is_file():
            logger.warning("%s is damaged; it is built again", kept)
        lowest, highest = _extremes_of_blocks(token_file)
        found = {"lowest_sampled_id": lowest, "highest_sampled_id": highest}
        write_text(kept, json.dumps(found) + "\n")
    return lowest, highest


def _extremes_of_blocks(token_file: TokenFile) -> Extremes:
    if token_file.num_tokens == 0:
        return 0, -1
    tokens = np.memmap(f"{token_file.prefix}.bin", token_file.dtype, mode="r")
    length = _BLOCK_BYTES // token_file.dtype.itemsize
    if len(tokens) <= _BLOCKS * length:
        starts = np.arange(0, len(tokens), length)
    else:  # the first and the last block are at the ends
        starts = np.linspace(0, len(tokens) - length, _BLOCKS).astype(np.int64)
    blocks = [tokens[start : start + length] for start in starts]
    return min(int(block.min()) for block in blocks), max(int(block.max()) for block in blocks)
