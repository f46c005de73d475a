"""From a command line to a resolved configuration that this job can run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from megapoly.config.parsing import parse, to_yaml
from megapoly.config.resolve import resolve
from megapoly.config.rules import check
from megapoly.config.rules.data import tokenizer_file
from megapoly.config.schema import Config


def configure(argv: Sequence[str], *, default_recipe: Path, program: str) -> Config:
    """Parse, check and resolve; what asks for something else than a run does that, and exits.

    These are ``--help``, ``--print_config`` and ``--dry-run``, of which rank 0 prints the outcome.

    Needs no process group: the size of the job and the rank are read from ``WORLD_SIZE`` and
    ``RANK``, which torchrun sets; without them the job is one process.

    Args:
        argv: see :func:`megapoly.config.parsing.parse`.
        default_recipe: the recipe when ``argv`` names none.
        program: name to show in the help.

    Returns:
        The resolved configuration, which breaks no rule.

    Raises:
        ConfigError: what cannot be parsed, or else every broken rule.
        DataError: the tokenizer's file exists and cannot be used.
        SystemExit: nothing is to be trained; with the exit status.
    """
    arguments = parse(argv, default_recipe=default_recipe, program=program)
    if arguments.dry_run is not None:
        from megapoly.planning.dry_run_command import run_command

        raise SystemExit(run_command(arguments.config, arguments.dry_run))
    resolved = check_and_resolve(arguments.config)
    if arguments.print_config:
        if os.environ.get("RANK", "0") == "0":
            print(to_yaml(resolved), end="")
        raise SystemExit(0)
    return resolved


def check_and_resolve(config: Config, problems: Sequence[str] = ()) -> Config:
    """The resolved configuration, if this job can run it.

    Args:
        config: resolved or not; not changed.
        problems: what is wrong beside the rules, reported together with them.

    Raises:
        ConfigError: ``problems``, and every broken rule.
        DataError: the tokenizer's file exists and cannot be used.
    """
    # Here and not above: --help and a wrong command line answer without waiting for torch.
    from megapoly.platform.device import this_machine

    machine = this_machine()
    vocab_size = tokenizer_vocab_size(config)
    check(
        config,
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        machine=machine,
        tokenizer_vocab_size=vocab_size,
        problems=problems,
    )
    assert vocab_size is not None, "the rules refuse a tokenizer that does not exist"
    return resolve(
        config,
        tokenizer_vocab_size=vocab_size,
        machine=machine,
    )


def tokenizer_vocab_size(config: Config) -> int | None:
    """Ids of the tokenizer; None if its file does not exist, which has a rule of its own."""
    from megapoly.data.tokenizer import load_tokenizer

    tokenizer = config.data.tokenizer
    if tokenizer is not None and not tokenizer_file(tokenizer).is_file():
        return None
    return load_tokenizer(tokenizer).vocab_size
