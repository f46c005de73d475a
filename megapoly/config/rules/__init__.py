"""Rules across fields, machine and files; all broken rules are reported at once.

A rule is a function from :class:`~megapoly.config.rules.facts.Facts` to messages. It is enabled by
its entry in one of the tuples that :data:`RULES` joins. Rules run before any process group exists,
on configurations that are resolved or not.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from megapoly.config.rules import (
    data,
    exports,
    gpu,
    layout,
    model,
    profile,
    run,
    schedule,
    spikes,
    tasks,
    values,
)
from megapoly.config.rules.facts import Facts, Rule
from megapoly.config.schema import Config
from megapoly.errors import ConfigError
from megapoly.platform.machine import Machine

RULES: tuple[Rule, ...] = (
    *values.RULES,
    *model.RULES,
    *layout.RULES,
    *schedule.RULES,
    *spikes.RULES,
    *run.RULES,
    *gpu.RULES,
    *profile.RULES,
    *exports.RULES,
    *data.RULES,
    *tasks.RULES,
)

# About files that the configuration reads, on the machine that runs it.
RULES_ON_FILES: frozenset[Rule] = frozenset(
    {
        data.token_files_exist,
        data.tokenizer_exists,
        exports.folders_of_exports_exist,
        run.checkpoint_exists,
        run.folders_can_be_made,
        tasks.task_data_exists,
        tasks.harness_is_installed,
    }
)


def find_problems(
    config: Config,
    *,
    world_size: int,
    machine: Machine,
    tokenizer_vocab_size: int | None = None,
    with_files: bool = True,
) -> list[str]:
    """Return one message for each broken rule: the rule, the values, the remedy.

    Args:
        config: resolved or not; not changed.
        world_size: processes of the job.
        machine: what every process has.
        tokenizer_vocab_size: ids of the tokenizer; None: not known, which skips the rule about it.
        with_files: whether the files that the configuration reads must exist here; false for a
            job that is planned for other machines.
    """
    facts = Facts(
        config,
        world_size,
        machine,
        tokenizer_vocab_size,
        lm_eval_available=importlib.util.find_spec("lm_eval") is not None,
    )
    rules = [rule for rule in RULES if with_files or rule not in RULES_ON_FILES]
    return [problem for rule in rules for problem in rule(facts)]


def check(
    config: Config,
    *,
    world_size: int,
    machine: Machine,
    tokenizer_vocab_size: int | None = None,
    with_files: bool = True,
    problems: Sequence[str] = (),
) -> None:
    """Refuse a configuration that breaks a rule.

    Args:
        config: as for :func:`find_problems`, also the next four.
        world_size: see there.
        machine: see there.
        tokenizer_vocab_size: see there.
        with_files: see there.
        problems: other problems, reported together with the broken rules.

    Raises:
        ConfigError: ``problems`` and all broken rules.
    """
    found = find_problems(
        config,
        world_size=world_size,
        machine=machine,
        tokenizer_vocab_size=tokenizer_vocab_size,
        with_files=with_files,
    )
    if problems or found:
        raise ConfigError([*problems, *found])
