"""Resolve a configuration for machines that are not available."""

from __future__ import annotations

from collections.abc import Sequence

from megapoly.config import Config
from megapoly.config.resolve import resolve
from megapoly.config.rules import check
from megapoly.data.tokenizer import tokenizer_vocab_size
from megapoly.platform.machine import Machine


def planned_config(
    config: Config, world_size: int, machine: Machine, *, problems: Sequence[str] = ()
) -> Config:
    """Return the resolved configuration of a job that is not started here.

    Args:
        config: resolved or not; not changed.
        world_size: ranks of the job.
        machine: what every rank is meant to run on.
        problems: other problems, reported together with the broken rules.

    Raises:
        ConfigError: all broken rules except those on files, which need not exist here.
        DataError: the tokenizer's file exists and cannot be used.
    """
    found = list(problems)
    vocab_size = tokenizer_vocab_size(config.data.tokenizer)
    if vocab_size is None and config.model.vocab_size is None:
        found.append(
            f"`model.vocab_size` (null) is the tokenizer's, and `data.tokenizer` "
            f"({config.data.tokenizer}) does not exist here; set `--model.vocab_size`"
        )
    check(
        config,
        world_size=world_size,
        machine=machine,
        tokenizer_vocab_size=vocab_size,
        with_files=False,
        problems=found,
    )
    return resolve(
        config, tokenizer_vocab_size=vocab_size or config.model.vocab_size or 0, machine=machine
    )
