"""Trials of a comparison: runs that differ only in activation, order, rate and seed."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megapoly.activations import registry
from megapoly.config import Config
from megapoly.config.resolve import resolve, tokens_per_step, train_iters
from megapoly.config.rules.model import COEFFICIENT_OPTIONS, NORM_OPTIONS
from megapoly.config.schema import ModelConfig
from megapoly.errors import ConfigError
from megapoly.platform.machine import CPU
from megapoly.polynomial import DEFAULT_ORDER
from megapoly.preflight.planning.parameters import total_parameters

# Of the activation; each trial's own order is part of its variant.
_OPTIONS_OF_SOME = [
    name.removeprefix("model.")
    for name in (*COEFFICIENT_OPTIONS, *NORM_OPTIONS)
    if name != "model.activation_order"
]
# How far the parameters of compared models may differ, relative to the first: coefficients differ,
# and so do gated widths that 3 does not divide.
PARAMETER_TOLERANCE = 0.01


@dataclass(frozen=True)
class Variant:
    """An activation, with its order where it has one.

    Args:
        activation: name in the registry.
        order: highest power; None for an activation without powers.
    """

    activation: str
    order: int | None

    @property
    def name(self) -> str:
        """``polyrelu``, or ``polyrelu_order_4`` if the order is not the default."""
        usual = self.order in (None, DEFAULT_ORDER)
        return self.activation if usual else f"{self.activation}_order_{self.order}"


@dataclass(frozen=True)
class Trial:
    """One run.

    Args:
        variant: activation.
        lr: highest learning rate; the lowest keeps its ratio to it.
        seed: of the weights and of the order of the data.
    """

    variant: Variant
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """Name of its folder, such as ``polynorm.lr_0.004.seed_1``."""
        return f"{self.variant.name}.lr_{self.lr:g}.seed_{self.seed}"

    def config(self, base: Config, output: Path) -> Config:
        """Return the configuration of the run, made from the common one.

        Options that the activation does not have keep their defaults: the common one sets them for
        the activations that have them.
        """
        config = copy.deepcopy(base)
        config.run_dir = str(output / self.name)
        config.model.activation = self.variant.activation
        config.model.activation_order = self.variant.order or DEFAULT_ORDER
        for name in ("min_lr", "lr_warmup_init"):  # fractions of the highest rate
            fraction = getattr(base.optimizer, name) / base.optimizer.lr
            setattr(config.optimizer, name, self.lr * fraction)
        config.optimizer.lr = self.lr
        config.training.seed = config.data.seed = self.seed
        return with_own_options(config)


def with_own_options(config: Config) -> Config:
    """Return a configuration with defaults for the options that its activation does not have."""
    own = copy.deepcopy(config)
    for name in _options_without_effect(own.model.activation):
        setattr(own.model, name, getattr(ModelConfig, name))
    return own


def options_of_some(base: Config, variants: Sequence[Variant]) -> dict[str, list[str]]:
    """Return the options that only some of the activations have, with these activations.

    Args:
        base: configuration of all trials; options with default values are left out.
        variants: activations to compare.

    Raises:
        ConfigError: an option is set that none of the activations has.
    """
    found, problems = {}, []
    every = dict.fromkeys(variant.activation for variant in variants)
    for name in _OPTIONS_OF_SOME:
        value = getattr(base.model, name)
        if value == getattr(ModelConfig, name):
            continue
        has = [each for each in every if name not in _options_without_effect(each)]
        if not has:
            problems.append(
                f"`model.{name}` ({value}) has no effect with any of the compared activations "
                f"({', '.join(every)}); leave it out, or add one that has it, such as polynorm"
            )
        elif len(has) < len(every):
            found[name] = has
    if problems:
        raise ConfigError(problems)
    return found


def _options_without_effect(activation: str) -> list[str]:
    entry = registry.get(activation)
    without = [] if entry.has_coefficients else list(COEFFICIENT_OPTIONS)
    without += [] if entry.normalized else list(NORM_OPTIONS)
    return [name.removeprefix("model.") for name in without]


def parse_variants(names: Sequence[str], orders: Sequence[int] | None) -> list[Variant]:
    """Return the variants that the command line names.

    Args:
        names: activations; ``polyrelu:4`` is polyrelu of order 4 alone.
        orders: of the polynomial activations that are named without one; None: the default.

    Raises:
        ConfigError: a name is not in the registry, an order is not valid or is given to an
            activation without powers, the orders have no effect, or a variant is named twice.
    """
    problems, variants, takes_orders = [], [], False
    for given in names:
        name, _, order = given.partition(":")
        try:
            has_powers = registry.get(name).has_coefficients
        except ConfigError as error:
            problems += error.problems
            continue
        if order and not (has_powers and order in ("2", "3", "4")):
            kind = "2, 3 or 4" if has_powers else f"none: {name} has no powers"
            problems.append(f"the order of `{given}` must be {kind}")
        elif order:
            variants.append(Variant(name, int(order)))
        elif has_powers:
            takes_orders = True
            variants += [Variant(name, o) for o in orders or [DEFAULT_ORDER]]
        else:
            variants.append(Variant(name, None))
    twice = sorted({v.name for v in variants if variants.count(v) > 1})
    if twice:
        problems.append(f"every activation must be named once; {', '.join(twice)} is named twice")
    if orders and not (takes_orders or problems):
        problems.append(
            f"`--orders` ({' '.join(map(str, orders))}) has no effect unless a polynomial "
            "activation is named without an order; leave it out"
        )
    if problems:
        raise ConfigError(problems)
    return variants


def rate_trials(variants: Sequence[Variant], rates: Sequence[float], seed: int) -> list[Trial]:
    """Return the trials of every activation at every learning rate, with one seed."""
    return [Trial(variant, lr, seed) for lr in rates for variant in variants]


def seed_trials(rates: Mapping[Variant, Sequence[float]], seeds: Sequence[int]) -> list[Trial]:
    """Return the trials of every activation at its learning rates, with every seed."""
    return [
        Trial(variant, lr, seed) for seed in seeds for variant in rates for lr in rates[variant]
    ]


def sizes(base: Config, variants: Sequence[Variant]) -> list[int]:
    """Return the number of parameters of each variant's model; ``base`` has a ``vocab_size``."""
    assert base.model.vocab_size is not None
    return [
        total_parameters(
            resolve(
                Trial(variant, base.optimizer.lr, 0).config(base, Path()),
                tokenizer_vocab_size=base.model.vocab_size,
                machine=CPU,  # a GPU changes nothing that is counted
            )
        )
        for variant in variants
    ]


def check_comparable(base: Config, variants: Sequence[Variant]) -> None:
    """Check that the models have equal size and that the trials evaluate and save.

    Args:
        base: configuration of all trials, valid, with ``vocab_size``.
        variants: activations to compare.

    Raises:
        ConfigError: numbers of parameters differ by more than :data:`PARAMETER_TOLERANCE`, or
            evaluation or saving is disabled.
    """
    found = sizes(base, variants)
    problems = [
        f"compared models must have parameters equal to {PARAMETER_TOLERANCE:.0%}: "
        f"{variant.name} has {size:,}, {variants[0].name} {found[0]:,}; gated activations get two "
        "thirds of a width with `model.scale_gated_ffn`, so choose widths that 3 divides"
        for variant, size in zip(variants, found, strict=True)
        if abs(size - found[0]) > PARAMETER_TOLERANCE * found[0]
    ]
    if not base.training.eval_interval:
        problems.append(
            "`training.eval_interval` (0) must be above 0: validation losses are compared; set it "
            "to the number of steps to evaluate only at the end"
        )
    if not base.checkpoint.save:
        problems.append(
            "`checkpoint.save` (false) must be true: a trial resumes from its checkpoint, and its "
            "analysis reads it"
        )
    if problems:
        raise ConfigError(problems)


def describe(base: Config, variants: Sequence[Variant]) -> Iterator[str]:
    """Describe what is the same in all trials, one line for each fact."""
    steps = train_iters(base)
    tokens = tokens_per_step(base)
    found = sizes(base, variants)
    kind = f"MoE of {base.model.num_moe_experts} experts" if base.model.num_moe_experts else "dense"
    yield f"{kind}, {base.model.num_layers} layers, width {base.model.hidden_size}"
    yield f"parameters: {min(found):,} to {max(found):,}"
    yield f"tokens: {steps * tokens:,} each, {steps} steps of {tokens:,}"
    for name, has in options_of_some(base, variants).items():
        value = getattr(base.model, name)
        yield f"model.{name} {value}: {', '.join(has)} alone; the others do not have it"


def with_tasks(base: Config, tasks: Sequence[str], folder: str | None, limit: int | None) -> Config:
    """Return the configuration with benchmark tasks after the last step."""
    return replace(
        base,
        training=replace(
            base.training,
            eval_tasks=list(tasks),
            eval_tasks_interval=train_iters(base),
            eval_tasks_data=folder,
            eval_tasks_limit=limit,
        ),
    )
