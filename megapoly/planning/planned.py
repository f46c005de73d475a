"""A configuration of a job that is to run elsewhere: checked and resolved without its files."""

from __future__ import annotations

from megapoly.config import Config
from megapoly.config.machine import Machine
from megapoly.config.resolve import resolve
from megapoly.config.rules import RULES_WITHOUT_FILES, find_problems
from megapoly.config.rules.data import tokenizer_file
from megapoly.errors import ConfigError


def check_and_resolve(config: Config, *, world_size: int, machine: Machine) -> Config:
    """The resolved configuration, if such a job can run.

    Args:
        config: resolved or not; not changed. ``model.vocab_size`` may be null only where the
            tokenizer is at hand.
        world_size: processes.
        machine: what every process has.

    Raises:
        ConfigError: every broken rule, but for those on files.
    """
    vocab_size, problems = _vocab_size(config)
    problems += find_problems(
        config,
        world_size=world_size,
        machine=machine,
        tokenizer_vocab_size=vocab_size,
        rules=RULES_WITHOUT_FILES,
    )
    if problems:
        raise ConfigError(problems)
    return resolve(config, tokenizer_vocab_size=vocab_size or 0, machine=machine)


def _vocab_size(config: Config) -> tuple[int | None, list[str]]:
    """Ids of the tokenizer if it is here, and what is wrong if nothing says how many there are."""
    from megapoly.data.tokenizer import load_tokenizer

    tokenizer = config.data.tokenizer
    if tokenizer is None or tokenizer_file(tokenizer).is_file():
        return load_tokenizer(tokenizer).vocab_size, []
    if config.model.vocab_size is not None:
        return None, []
    return None, [
        f"`model.vocab_size` (null) is the tokenizer's, and `data.tokenizer` ({tokenizer}) is not "
        "here; set the number of token ids"
    ]
