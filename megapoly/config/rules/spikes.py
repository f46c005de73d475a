"""Rules on what a run does about spikes, and on the batches that it passes over."""

from __future__ import annotations

from collections.abc import Iterator

from megapoly.config.options import short
from megapoly.config.rules.facts import Facts, Rule, have_no_effect
from megapoly.config.step_ranges import STEPS, step_range


def only_skipping_has_a_budget(facts: Facts) -> Iterator[str]:
    """A number of skips needs the action that skips."""
    action = facts.config.training.spike_action
    if action != "skip":
        yield from have_no_effect(
            facts.config,
            ["training.spike_max_skips"],
            f"with `training.spike_action` ({action})",
            ", or take skip",
        )


def budget_can_be_used_up(facts: Facts) -> Iterator[str]:
    """Fewer steps may be skipped than the window has, or a run could skip for ever."""
    training = facts.config.training
    if training.spike_action == "skip" and training.spike_max_skips >= training.spike_window >= 2:
        yield (
            f"`training.spike_max_skips` ({training.spike_max_skips}) must be below "
            f"`training.spike_window` ({training.spike_window}), or a run could skip every step; "
            f"{max(1, training.spike_window // 16)} is usual"
        )


def skipped_batches_are_steps(facts: Facts) -> Iterator[str]:
    """Batches to pass over are named by their steps."""
    entries = facts.config.training.skip_batches
    if entries == []:
        yield "`training.skip_batches` ([]) has no steps; leave it null, or list steps"
    for entry in entries or ():
        if step_range(entry) is None:
            yield (
                f"`training.skip_batches` ({short(entry)}) must have steps such as 1300 and ranges "
                f"such as 1200-1210, first and last included, {STEPS}"
            )


RULES: tuple[Rule, ...] = (
    only_skipping_has_a_budget,
    budget_can_be_used_up,
    skipped_batches_are_steps,
)
