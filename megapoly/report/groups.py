"""Runs that may be compared, in groups; within a group the models that its tables have a line for.

Two runs share a group if they have the same kind of model (dense or mixture of experts), training
data, tokenizer, validation sets, tokens, batch and sequence length, and parameters, total and
active, within 1 %. Seed and learning rate tell the runs of one model apart; whatever else differs
makes another model with a label of its own.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from megapoly.activations import registry
from megapoly.config.schema import ModelConfig
from megapoly.report.runs import Run

# Most that parameters may differ within a group, of the smallest model.
TOLERANCE = 0.01
# How something is computed and not what; or what the table shows anyway.
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
    """One model of a group: an activation, its order, and what else is its own.

    Args:
        activation: name in the registry.
        order: of a polynomial; None: it is none.
        variant: options in which it differs from most of the group.
        label: for tables and figures.
        runs: complete ones, at any learning rate and seed.
    """

    activation: str
    order: int | None
    variant: dict[str, Any]
    label: str
    runs: list[Run]

    @property
    def plain(self) -> bool:
        """Whether nothing but activation and order is its own."""
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

        Training loss where there is no validation; None where a run's is not finite.
        """
        common = set.intersection(*(set(runs) for runs in self.rates.values()))
        scores: dict[float, float | None] = {}
        for lr, runs in self.rates.items():
            losses = [final_loss(runs[seed]) for seed in common or runs]
            known = [loss for loss in losses if loss is not None]
            scores[lr] = sum(known) / len(known) if known and len(known) == len(losses) else None
        return scores

    @cached_property
    def lr(self) -> float:
        """The rate that the tables are of: with most seeds, among these with the lowest loss."""

        def rank(lr: float) -> tuple[int, float]:
            score = self.scores[lr]
            return -len(self.rates[lr]), float("inf") if score is None else score

        return min(self.rates, key=rank)

    @property
    def seeds(self) -> dict[str, Run]:
        """Runs at :attr:`lr`, by seed."""
        return self.rates[self.lr]


@dataclass(frozen=True)
class Group:
    """Runs that may be compared.

    Args:
        slug: begins the names of its figures.
        moe: whether its models are mixtures of experts.
        key: what its runs share, by name.
        entries: its models, in the registry's order.
        reference: the one that the others are compared with; None: it is not here.
        repeated: runs left out for another of the same model, rate and seed.
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
        """In words."""
        return "mixture of experts" if self.moe else "dense"

    @property
    def runs(self) -> list[Run]:
        """Of all entries."""
        return [run for entry in self.entries for run in entry.runs]

    def reference_for(self, entry: Entry) -> Entry | None:
        """The reference with the options of ``entry`` where there is one, else the reference."""
        if self.reference is None:
            return None
        known = _options(self.reference.runs[0])
        shared = {name: value for name, value in entry.variant.items() if name in known}
        same = (e for e in self.entries if e.activation == self.reference.activation)
        return next((e for e in same if e.variant == shared), self.reference)

    @cached_property
    def main(self) -> list[Entry]:
        """For each activation the plain entry of the usual order, or of the lowest there is."""
        usual = ModelConfig.activation_order
        found: dict[str, Entry] = {}
        for entry in self.entries:
            kept = found.get(entry.activation)
            if entry.plain and (kept is None or entry.order == usual):
                found[entry.activation] = entry
        return list(found.values())


def final_loss(run: Run) -> float | None:
    """What runs are ranked by: validation loss, or training loss where nothing was validated."""
    return run.validation_loss() if run.validation["tokens"] else run.training_loss


def group_runs(runs: Iterable[Run], reference: str) -> list[Group]:
    """Groups of the complete runs; dense ones first, then those with the most runs.

    Args:
        runs: complete or not.
        reference: activation.
    """
    by_key: dict[str, list[Run]] = {}
    for run in runs:
        if run.complete:
            by_key.setdefault(json.dumps(_key(run), sort_keys=True), []).append(run)
    parts = [part for group in by_key.values() for part in _of_equal_size(group)]
    parts.sort(key=lambda part: (_is_moe(part[0]), -len(part)))
    groups: list[Group] = []
    for part in parts:
        kind = "moe" if _is_moe(part[0]) else "dense"
        number = 1 + sum(group.moe == _is_moe(part[0]) for group in groups)
        groups.append(_group(kind if number == 1 else f"{kind}_{number}", part, reference))
    return groups


def _is_moe(run: Run) -> bool:
    return bool(run.config["model"]["num_moe_experts"])


def _key(run: Run) -> dict[str, Any]:
    """What all runs of a group share but the size."""
    config, training = run.config, run.config["training"]
    if run.data is None:
        data: Any = {"blend": config["data"]["blend"], "tokenizer": config["data"]["tokenizer"]}
    else:
        data = {
            "sources": [[s["fingerprint"], s["share"]] for s in run.data["sources"]],
            "tokenizer": run.data["tokenizer"],
        }
    return {
        "kind": "mixture of experts" if _is_moe(run) else "dense",
        "training data": data,
        "data known by": "its content" if run.data else "the configuration",
        "validation sets": config["data"]["validation"],
        "batches of an evaluation": training["eval_iters"],
        "tokens": run.tokens,
        "sequences of a batch": training["global_batch_size"],
        "tokens of a sequence": training["seq_length"],
    }


def _of_equal_size(runs: Sequence[Run]) -> list[list[Run]]:
    parts: list[list[Run]] = []
    for run in sorted(runs, key=lambda run: (run.parameters, run.active_parameters)):
        for part in parts:
            if _near(run.parameters, part[0].parameters) and _near(
                run.active_parameters, part[0].active_parameters
            ):
                part.append(run)
                break
        else:
            parts.append([run])
    return parts


def _near(count: int, other: int) -> bool:
    return abs(count - other) <= TOLERANCE * min(count, other)


def _group(slug: str, runs: list[Run], reference: str) -> Group:
    options = {run.key: _options(run) for run in runs}
    if len({round(run.config["optimizer"]["min_lr"] / run.lr, 6) for run in runs}) == 1:
        for values in options.values():  # a floor that follows the rate is one choice
            del values["optimizer.min_lr"]
    names = sorted({name for values in options.values() for name in values})
    base = {}
    for name in names:
        present = [json.dumps(v[name]) for v in options.values() if name in v]
        base[name] = json.loads(Counter(present).most_common(1)[0][0])
    models: dict[str, list[Run]] = {}
    variants: dict[str, dict[str, Any]] = {}
    for run in runs:
        own = {k: v for k, v in options[run.key].items() if v != base[k]}
        key = json.dumps([run.activation, _order(run), own])
        models.setdefault(key, []).append(run)
        variants[key] = own
    repeated: list[tuple[Run, Run]] = []
    entries = [
        _entry(members, variants[key], repeated, _several_orders(runs, members[0]))
        for key, members in models.items()
    ]
    entries.sort(key=_place)
    first = [entry for entry in entries if entry.activation == reference]
    group_key = {**_key(runs[0]), "parameters": runs[0].parameters}
    return Group(
        slug=slug,
        moe=_is_moe(runs[0]),
        key=group_key,
        entries=entries,
        reference=next((e for e in first if e.plain), first[0] if first else None),
        repeated=repeated,
        varied=sorted({name for own in variants.values() for name in own}),
    )


def _entry(
    members: Sequence[Run],
    variant: dict[str, Any],
    repeated: list[tuple[Run, Run]],
    several_orders: bool,
) -> Entry:
    kept: dict[tuple[float, str], Run] = {}
    for run in members:
        before = kept.get((run.lr, run.seed))
        if before is not None:
            repeated.append((before, run))
        kept[run.lr, run.seed] = run
    activation, order = members[0].activation, _order(members[0])
    label = registry.get(activation).title or activation
    if order is not None and (several_orders or order != ModelConfig.activation_order):
        label += f" r={order}"
    if variant:
        label += "; " + ", ".join(f"{k.split('.')[-1]} {_shown(v)}" for k, v in variant.items())
    return Entry(activation, order, variant, label, list(kept.values()))


def _several_orders(runs: Iterable[Run], of: Run) -> bool:
    return len({_order(run) for run in runs if run.activation == of.activation}) > 1


def _place(entry: Entry) -> tuple[int, int, bool, str]:
    position = list(registry.ACTIVATIONS).index(entry.activation)
    return position, entry.order or 0, not entry.plain, entry.label


def _order(run: Run) -> int | None:
    polynomial = registry.get(run.activation).has_coefficients
    return int(run.config["model"]["activation_order"]) if polynomial else None


def _options(run: Run) -> dict[str, Any]:
    """Options by which runs of one activation and order may be different models."""
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


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
