"""Check and resolve the configuration of this job."""

from __future__ import annotations

from collections.abc import Sequence

from megapoly.config.resolve import resolve
from megapoly.config.rules import check
from megapoly.config.schema import Config
from megapoly.platform import launcher


def check_and_resolve(
    config: Config, *, tokenizer_vocab_size: int | None, problems: Sequence[str] = ()
) -> Config:
    """Return the resolved configuration if it breaks no rule.

    Needs no process group: the launcher sets how many processes the job has.

    Args:
        config: resolved or not; not changed.
        tokenizer_vocab_size: ids of the tokenizer; None: its file does not exist, which a rule
            refuses.
        problems: other problems, reported together with the broken rules.

    Raises:
        ConfigError: ``problems``, and every broken rule.
    """
    # Here, not above: --help and a wrong command line answer without importing torch.
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
