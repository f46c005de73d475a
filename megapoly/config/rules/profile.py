"""Rules on the trace of some steps."""

from __future__ import annotations

from collections.abc import Iterator

from megapoly.config import resolve
from megapoly.config.rules.facts import Facts, Rule, have_no_effect
from megapoly.config.rules.schedule import has_lengths

OPTIONS = ("logging.profile_step_start", "logging.profile_step_end", "logging.profile_ranks")


def profile_options_have_effect(facts: Facts) -> Iterator[str]:
    """Options of the trace need a trace."""
    if not facts.config.logging.profile:
        condition, alternative = "with `logging.profile` (False)", ", or set that to true"
        yield from have_no_effect(facts.config, OPTIONS, condition, alternative)


def profile_steps_are_in_the_run(facts: Facts) -> Iterator[str]:
    """The first and the last step of the trace are steps of the run, in order."""
    logging = facts.config.logging
    first, last = logging.profile_step_start, logging.profile_step_end
    if not logging.profile or min(first, last) < 1:
        return
    if last < first:
        yield (
            f"`logging.profile_step_end` ({last}) is the last step of the trace and must not come "
            f"before `logging.profile_step_start` ({first}); {first} traces one step"
        )
    elif has_lengths(facts) and last > (steps := resolve.train_iters(facts.config)):
        yield (
            f"`logging.profile_step_start` ({first}) and `logging.profile_step_end` ({last}) must "
            f"be steps of the run, which has {steps}; {max(1, steps - last + first)} and {steps} "
            "are its last ones"
        )


def profile_ranks_exist(facts: Facts) -> Iterator[str]:
    """Each rank is one of the job, and named once."""
    ranks = facts.config.logging.profile_ranks
    if not facts.config.logging.profile:
        return
    if not ranks:
        yield (
            "`logging.profile_ranks` ([]) is empty, so nothing is traced; name a rank, or set "
            "`logging.profile` to false"
        )
    for rank in ranks:
        if not 0 <= rank < facts.world_size:
            yield (
                f"`logging.profile_ranks` has {rank}, but the ranks of this job are 0 to "
                f"{facts.world_size - 1}; remove it"
            )
    if len(set(ranks)) < len(ranks):
        yield f"`logging.profile_ranks` ({ranks}) names a rank twice; name each once"


RULES: tuple[Rule, ...] = (
    profile_options_have_effect,
    profile_steps_are_in_the_run,
    profile_ranks_exist,
)
