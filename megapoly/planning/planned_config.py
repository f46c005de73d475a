"""A configuration for machines that are not at hand."""

from __future__ import annotations

import importlib
from dataclasses import replace

from megapoly.config import Config
from megapoly.config.machine import Machine
from megapoly.config.resolve import resolve
from megapoly.config.rules import check
from megapoly.config.startup import tokenizer_vocab_size


def planned_config(config: Config, world_size: int, machine: Machine) -> Config:
    """The resolved configuration of a job that is not started here.

    Args:
        config: resolved or not; not changed.
        world_size: ranks of the job.
        machine: what every rank is to run on.

    Raises:
        ConfigError: every broken rule, but those on files, which need not be here.
        DataError: the tokenizer's file exists and cannot be used.
    """
    problems = []
    if config.model.transformer_engine and not machine.transformer_engine:
        reason = _why_transformer_engine_is_unusable()
        if reason:
            problems.append(
                "`model.transformer_engine` (True) needs Transformer Engine, to build its layers, "
                f"and it cannot be imported here: {reason}; leave it null, which builds the same "
                "weights with the local layers"
            )
        machine = replace(machine, transformer_engine=True)
    vocab_size = tokenizer_vocab_size(config)
    if vocab_size is None and config.model.vocab_size is None:
        problems.append(
            f"`model.vocab_size` (null) is the tokenizer's, and `data.tokenizer` "
            f"({config.data.tokenizer}) is not here; set `--model.vocab_size`"
        )
    check(
        config,
        world_size=world_size,
        machine=machine,
        tokenizer_vocab_size=vocab_size,
        with_files=False,
        problems=problems,
    )
    return resolve(
        config, tokenizer_vocab_size=vocab_size or config.model.vocab_size or 0, machine=machine
    )


def _why_transformer_engine_is_unusable() -> str | None:
    try:
        importlib.import_module("transformer_engine.pytorch")
    except (ImportError, OSError, RuntimeError) as error:  # without a GPU, a library is missing
        return str(error).splitlines()[0]
    return None
