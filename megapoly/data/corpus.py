"""The data of a run: training samples, named validation sets, tokenizer, fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron.core.datasets.utils import Split

from megapoly.config.schema import Config
from megapoly.data.builtin import prepare_builtin_text
from megapoly.data.samples import SamplePool, open_pool
from megapoly.data.tokenizer import Tokenizer
from megapoly.errors import DataError

BUILTIN_VALIDATION_SET = "books"


@dataclass(frozen=True)
class Corpus:
    """What a run reads.

    Args:
        train: training samples of one epoch.
        validation: samples of each validation set.
        tokenizer: what turns text into ids.
        fingerprint: changes when the training samples do: with the token files, the tokenizer,
            ``seq_length`` or the seed. 16 hexadecimal digits.
    """

    train: SamplePool
    validation: dict[str, SamplePool]
    tokenizer: Tokenizer
    fingerprint: str


def load_corpus(
    config: Config,
    *,
    tokenizer: Tokenizer,
    builder_first: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Corpus:
    """Open the data that ``config.data`` names; tokenize the built-in text if it is needed.

    Args:
        config: the run.
        tokenizer: of :func:`megapoly.data.tokenizer.load_tokenizer`.
        builder_first: returns a context in which one process for each ``cache_dir`` (rank 0, or
            local rank 0 on hosts without a common disk) runs the body before the others enter it.
            The first writes token files and sample indices, the others find them.

    Raises:
        DataError: a file is missing, damaged or too short, or a list of files is empty.
    """
    cache_dir = Path(config.data.cache_dir or Path(config.run_dir) / "cache")
    with builder_first():
        train, validation = _prefixes(config, cache_dir, tokenizer)
        open_split = partial(
            open_pool,
            seq_length=config.training.seq_length,
            seed=config.data.seed,
            tokenizer=tokenizer,
            vocab_size=config.model.vocab_size or tokenizer.vocab_size,
            eod_mask_loss=config.data.eod_mask_loss,
            cache_dir=cache_dir,
        )
        train_pool = open_split(train, Split.train)
        pools = {name: open_split(paths, Split.valid) for name, paths in validation.items()}
    return Corpus(train_pool, pools, tokenizer, _fingerprint(train_pool, config, tokenizer))


def _prefixes(
    config: Config, cache_dir: Path, tokenizer: Tokenizer
) -> tuple[list[str], dict[str, list[str]]]:
    """Token files of training and of each validation set."""
    train, validation = config.data.train_data_path, config.data.valid_data_path
    if train is None:
        builtin = prepare_builtin_text(cache_dir, tokenizer)
        train = [str(builtin["train"])]
        if validation is None:
            validation = {BUILTIN_VALIDATION_SET: [str(builtin["validation"])]}
    validation = validation or {}
    named = {"data.train_data_path": train}
    named |= {f"data.valid_data_path.{name}": paths for name, paths in validation.items()}
    for name, paths in named.items():
        if not paths:
            raise DataError(f"`{name}` must name at least one token file; it is an empty list.")
    return train, validation


def _fingerprint(pool: SamplePool, config: Config, tokenizer: Tokenizer) -> str:
    files = [token_file.fingerprint for token_file in pool.token_files]
    parts = [files, config.training.seq_length, config.data.seed, tokenizer.fingerprint]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
