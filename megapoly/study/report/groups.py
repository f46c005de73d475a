"""Groups of models that a report compares; each model is a line of the tables."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from megapoly.activations import registry
from megapoly.config.schema import ModelConfig
from megapoly.study.report.runs import Run

# Options that change how something is computed, not what; or that the table shows anyway.
_NOT_OF_THE_MODEL = {
    "model.activation",
    "model.activation_order",
    "model.activation_backend",
    "model.activation_deterministic",
    "model.make_vocab_size_divisible_by",
    "model.moe_token_dispatcher_type",
    "model.moe_grouped_gemm",
    "model.moe_permute_fusion",
    "model.transformer_engine",
    "model.apply_rope_fusion",
    "optimizer.lr",
    "training.seed",
    "training.train_iters",
    "training.train_tokens",
    "training.micro_batch_size",
    "training.global_batch_size",
    "training.seq_length",
    "training.gradient_accumulation_fusion",
    "training.device",
}
_OF_POLYNOMIALS = {"model.activation_coefficients"}
_OF_NORMALIZED = {"model.activation_norm", "model.activation_eps"}


@dataclass(frozen=True)
class Entry:
    """One model of a group: an activation, its order and its options.

    Args:
        activation: name in the registry.
        order: of a polynomial; None for other activations.
        variant: options in which it differs from most of the group.
        title: activation, with its order if the group has several orders.
        label: title and variant, for tables and figures.
        runs: complete runs, at any learning rate and seed.
        diverged: seeds of the runs that diverged, by learning rate.
    """

    activation: str
    order: int | None
    variant: dict[str, Any]
    title: str
    label: str
    runs: list[Run]
    diverged: dict[float, list[str]]

    @property
    def plain(self) -> bool:
        """Whether it differs from most of the group only in activation and order."""
        return not self.variant

    @cached_property
    def rates(self) -> dict[float, dict[str, Run]]:
        """Runs by learning rate, ascending, and seed."""
        rates: dict[float, dict[str, Run]] = {}
        for run in sorted(self.runs, key=lambda run: run.lr):
            rates.setdefault(run.lr, {})[run.seed] = run
        return rates

    @cached_property
    def scores(self) -> dict[float, float | None]:
        """Final validation loss by learning rate: mean over the seeds that all rates have.

        It is the training loss if there is no validation, and None if a run's loss is not finite or
        a run diverged.
        """
        return {**_scores(self.rates), **dict.fromkeys(self.diverged)}

    @property
    def tried(self) -> list[float]:
        """Learning rates, ascending, including those at which runs diverged."""
        return sorted({*self.rates, *self.diverged})

    @cached_property
    def lr(self) -> float:
        """Rate that the tables show.

        It is the one with the lowest loss among the rates with the most seeds, over the seeds that
        these share. A rate at which a run diverged is chosen only if there is no other.
        """
        sound = {lr: runs for lr, runs in self.rates.items() if lr not in self.diverged}
        rates = sound or self.rates
        most = max(len(runs) for runs in rates.values())
        scores = _scores({lr: runs for lr, runs in rates.items() if len(runs) == most})
        known = {lr: float("inf") if score is None else score for lr, score in scores.items()}
        return min(known, key=lambda lr: known[lr])

    @property
    def seeds(self) -> dict[str, Run]:
        """Runs at :attr:`lr`, by seed."""
        return self.rates[self.lr]

    @property
    def analysed(self) -> Run | None:
        """First run at this rate that has an analysis."""
        return next((run for run in self.seeds.values() if run.analysis), None)


@dataclass(frozen=True)
class RunGroup:
    """Runs that may be compared.

    Args:
        slug: prefix of the names of its figures.
        moe: whether its models are mixtures of experts.
        key: what its runs share, by name.
        entries: its models, in the registry's order.
        reference: entry that the others are compared with, if the group has it.
        repeated: runs left out because of another with the same model, rate and seed.
        varied: options that differ among its runs.
    """

    slug: str
    moe: bool
    key: dict[str, Any]
    entries: list[Entry]
    reference: Entry | None
    repeated: list[tuple[Run, Run]]
    varied: list[str] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """Kind of the models."""
        return "mixture of experts" if self.moe else "dense"

    @property
    def ranked_by(self) -> str:
        """Which loss :func:`final_loss` is: validation or training."""
        return "validation" if self.runs[0].validation["tokens"] else "training"

    @property
    def runs(self) -> list[Run]:
        """Runs of all entries."""
        return [run for entry in self.entries for run in entry.runs]

    def reference_for(self, entry: Entry) -> Entry | None:
        """Return the reference with the options of ``entry`` if it exists, else the reference."""
        if self.reference is None:
            return None
        known = options_of(self.reference.runs[0])
        shared = {name: value for name, value in entry.variant.items() if name in known}
        same = (e for e in self.entries if e.activation == self.reference.activation)
        return next((e for e in same if e.variant == shared), self.reference)

    @cached_property
    def main(self) -> list[Entry]:
        """Plain entry of each activation, of the default order or else of the lowest."""
        default = ModelConfig.activation_order
        found: dict[str, Entry] = {}
        for entry in self.entries:
            kept = found.get(entry.activation)
            if entry.plain and (kept is None or entry.order == default):
                found[entry.activation] = entry
        return list(found.values())


def _scores(rates: dict[float, dict[str, Run]]) -> dict[float, float | None]:
    common = set.intersection(*(set(runs) for runs in rates.values()))
    scores: dict[float, float | None] = {}
    for lr, runs in rates.items():
        scores[lr] = mean_final_loss([runs[seed] for seed in common or runs])
    return scores


def mean_final_loss(runs: Collection[Run]) -> float | None:
    """Return the mean final loss; None if one is not finite."""
    known = [loss for run in runs if (loss := final_loss(run)) is not None]
    return sum(known) / len(known) if known and len(known) == len(runs) else None


def final_loss(run: Run) -> float | None:
    """Return the loss by which runs are ranked: validation loss, or else training loss."""
    return run.validation_loss() if run.validation["tokens"] else run.training_loss


def options_of(run: Run) -> dict[str, Any]:
    """Return the options in which different models of one activation and order may differ."""
    activation = registry.get(run.activation)
    options = {
        f"{section}.{name}": value
        for section in ("model", "optimizer", "training")
        for name, value in run.config[section].items()
        if f"{section}.{name}" not in _NOT_OF_THE_MODEL and not name.startswith("eval_")
    }
    left_out = set()
    if not activation.has_coefficients:
        left_out |= _OF_POLYNOMIALS
    if not activation.normalized:
        left_out |= _OF_NORMALIZED
    return {name: value for name, value in options.items() if name not in left_out}


def describe_options(variant: dict[str, Any]) -> str:
    """Write options and their values as text."""
    return ", ".join(f"{name.split('.')[-1]} {_shown(value)}" for name, value in variant.items())


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
