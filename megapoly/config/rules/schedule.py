"""Rules on the length of the run, the batch, the learning rate and weight decay."""

from __future__ import annotations

from collections.abc import Iterator

from megapoly.config import resolve
from megapoly.config.parsing import STEP_AND_TOKEN_FORMS
from megapoly.config.ranges import LARGEST_COUNT
from megapoly.config.rules.facts import Facts, Rule, have_no_effect, must_be_multiple, value_of

LENGTH, *PARTS = STEP_AND_TOKEN_FORMS


def run_has_one_length(facts: Facts) -> Iterator[str]:
    """The length of the run is given in steps or in tokens."""
    steps, tokens = (value_of(facts.config, form) for form in LENGTH)
    if (steps is None) == (tokens is None):
        found = "neither" if steps is None else f"both ({steps} and {tokens})"
        yield f"exactly one of `{LENGTH[0]}` and `{LENGTH[1]}` must be set, not {found}"


def steps_can_be_counted(facts: Facts) -> Iterator[str]:
    """A length in tokens is a number of steps that can be counted."""
    if not has_lengths(facts):
        return
    in_steps = (
        resolve.train_iters,
        resolve.lr_warmup_iters,
        resolve.lr_decay_iters,
        resolve.lr_wsd_decay_iters,
    )
    for (_, tokens), steps_of in zip(STEP_AND_TOKEN_FORMS, in_steps, strict=True):
        given, steps = value_of(facts.config, tokens), steps_of(facts.config) or 0
        if given is not None and steps > LARGEST_COUNT:
            yield (
                f"`{tokens}` ({given}) is {steps} steps of {resolve.tokens_per_step(facts.config)} "
                f"tokens, and must be at most {LARGEST_COUNT} steps; take fewer tokens, or larger "
                "batches"
            )


def parts_have_one_length(facts: Facts) -> Iterator[str]:
    """Warm-up and decay are given in steps or in tokens."""
    for in_steps, in_tokens in PARTS:
        steps, tokens = value_of(facts.config, in_steps), value_of(facts.config, in_tokens)
        if steps is not None and tokens is not None:
            yield (
                f"`{in_steps}` ({steps}) and `{in_tokens}` ({tokens}) set the same length twice; "
                "keep one"
            )


def batch_divides(facts: Facts) -> Iterator[str]:
    """A global batch is a whole number of micro-batches on every replica."""
    training, replicas = facts.config.training, facts.data_parallel_size
    if replicas is not None:
        yield from must_be_multiple(
            "`training.global_batch_size`",
            training.global_batch_size,
            training.micro_batch_size * replicas,
            f"`training.micro_batch_size` * the data-parallel size, {training.micro_batch_size} * "
            f"{replicas}",
        )


def learning_rates_are_ordered(facts: Facts) -> Iterator[str]:
    """The learning rate rises and then decays."""
    optimizer = facts.config.optimizer
    if optimizer.lr_warmup_init > optimizer.lr:
        yield (
            f"`optimizer.lr_warmup_init` ({optimizer.lr_warmup_init}) must not exceed "
            f"`optimizer.lr` ({optimizer.lr}); 0 is usual"
        )
    if optimizer.min_lr > optimizer.lr:
        yield (
            f"`optimizer.min_lr` ({optimizer.min_lr}) must not exceed `optimizer.lr` "
            f"({optimizer.lr}); a tenth of it, {optimizer.lr / 10:g}, is usual"
        )


def decay_of_norms_has_a_rate(facts: Facts) -> Iterator[str]:
    """Without weight decay, norms do not decay either."""
    if facts.config.optimizer.weight_decay == 0:
        yield from have_no_effect(
            facts.config, ["optimizer.decay_norms"], "with `optimizer.weight_decay` (0)"
        )


def warmup_has_steps(facts: Facts) -> Iterator[str]:
    """Only a warm-up begins at a rate of its own."""
    if has_lengths(facts) and not resolve.lr_warmup_iters(facts.config):
        yield from have_no_effect(
            facts.config,
            ["optimizer.lr_warmup_init"],
            "without a warm-up",
            ", or set `optimizer.lr_warmup_iters`",
        )


def warmup_ends_before_decay(facts: Facts) -> Iterator[str]:
    """The engine's scheduler needs a step between the two."""
    if not has_lengths(facts):
        return
    warmup, decay = resolve.lr_warmup_iters(facts.config), resolve.lr_decay_iters(facts.config)
    if warmup >= decay:
        yield (
            f"the warm-up of the learning rate ({warmup} steps) must end before its decay does "
            f"({decay} steps); set `optimizer.lr_warmup_iters` to at most {decay - 1}, or train "
            "longer"
        )


def wsd_has_its_options(facts: Facts) -> Iterator[str]:
    """WSD needs the length of its decay, and only WSD has one."""
    keys = ("lr_wsd_decay_iters", "lr_wsd_decay_tokens", "lr_wsd_decay_style")
    optimizer = facts.config.optimizer
    if optimizer.lr_decay_style != "WSD":
        yield from have_no_effect(
            facts.config,
            [f"optimizer.{key}" for key in keys],
            f"with `optimizer.lr_decay_style` ({optimizer.lr_decay_style})",
            ", or take WSD",
        )
    elif optimizer.lr_wsd_decay_iters is None and optimizer.lr_wsd_decay_tokens is None:
        yield (
            "`optimizer.lr_decay_style` (WSD) needs `optimizer.lr_wsd_decay_iters` or "
            "`optimizer.lr_wsd_decay_tokens`; a tenth of the run is usual"
        )


def wsd_decay_fits(facts: Facts) -> Iterator[str]:
    """The decay at the end begins after the warm-up."""
    if not has_lengths(facts) or facts.config.optimizer.lr_decay_style != "WSD":
        return
    warmup, decay = resolve.lr_warmup_iters(facts.config), resolve.lr_decay_iters(facts.config)
    end = resolve.lr_wsd_decay_iters(facts.config) or 0
    if warmup < decay < warmup + end:
        yield (
            f"the decay that ends WSD ({end} steps) must fit between warm-up ({warmup}) and the "
            f"end of the schedule ({decay}); {decay - warmup} steps is the longest"
        )


def constant_rate_has_no_decay(facts: Facts) -> Iterator[str]:
    """A constant learning rate never decays, so a length of the decay has no effect."""
    if not has_lengths(facts) or facts.config.optimizer.lr_decay_style != "constant":
        return
    decay = resolve.lr_decay_iters(facts.config)
    if decay != resolve.train_iters(facts.config):
        yield (
            f"the length of the decay ({decay} steps) has no effect with "
            "`optimizer.lr_decay_style` (constant); leave `optimizer.lr_decay_iters` and "
            "`optimizer.lr_decay_tokens` null"
        )


def has_lengths(facts: Facts) -> bool:
    """Return whether all lengths can be computed in steps; other rules report what prevents it."""
    config = facts.config
    pairs = [[value_of(config, form) for form in forms] for forms in STEP_AND_TOKEN_FORMS]
    counts = [sum(value is not None for value in pair) for pair in pairs]
    numbers = [value for pair in pairs for value in pair if value is not None]
    return (
        counts[0] == 1
        and max(counts) == 1
        and min(numbers) >= 0
        and min(config.training.global_batch_size, config.training.seq_length) >= 1
    )


RULES: tuple[Rule, ...] = (
    run_has_one_length,
    steps_can_be_counted,
    parts_have_one_length,
    batch_divides,
    learning_rates_are_ordered,
    decay_of_norms_has_a_rate,
    warmup_has_steps,
    warmup_ends_before_decay,
    wsd_has_its_options,
    wsd_decay_fits,
    constant_rate_has_no_decay,
)
