"""A configuration for machines that are not at hand."""

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
    """The resolved configuration of a job that is not started here.

    Args:
        config: resolved or not; not changed.
        world_size: ranks of the job.
        machine: what every rank is to run on.
        problems: what else is wrong, reported together with the rules.

    Raises:
        ConfigError: every broken rule, but those on files, which need not be here.
        DataError: the tokenizer's file exists and cannot be used.
    """
    found = list(problems)
    vocab_size = tokenizer_vocab_size(config.data.tokenizer)
    if vocab_size is None and config.model.vocab_size is None:
        found.append(
            f"`model.vocab_size` (null) is the tokenizer's, and `data.tokenizer` "
            f"({config.data.tokenizer}) is not here; set `--model.vocab_size`"
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
