"""From a configuration to a resolved one that this job can run."""

from __future__ import annotations

from collections.abc import Sequence

from megapoly.config.resolve import resolve
from megapoly.config.rules import check
from megapoly.config.schema import Config
from megapoly.platform import launcher


def check_and_resolve(
    config: Config, *, tokenizer_vocab_size: int | None, problems: Sequence[str] = ()
) -> Config:
    """Return the resolved configuration, if this job can run it.

    Needs no process group: a launcher such as torchrun says how many processes the job has.

    Args:
        config: resolved or not; not changed.
        tokenizer_vocab_size: ids of the tokenizer; None: its file does not exist, which is refused.
        problems: what is wrong beside the rules, reported together with them.

    Raises:
        ConfigError: ``problems``, and every broken rule.
    """
    # Here and not above: --help and a wrong command line answer without waiting for torch.
    from megapoly.platform.device import this_machine

    machine = this_machine()
    check(
        config,
        world_size=launcher.world_size(),
        machine=machine,
        tokenizer_vocab_size=tokenizer_vocab_size,
        problems=problems,
    )
    assert tokenizer_vocab_size is not None, "the rules refuse a tokenizer that does not exist"
    return resolve(config, tokenizer_vocab_size=tokenizer_vocab_size, machine=machine)
