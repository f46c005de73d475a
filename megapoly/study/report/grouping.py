"""Groups of runs that may be compared, and the models that each line of a table shows.

Two runs share a group if they have the same kind of model (dense or mixture of experts), training
data, tokenizer, validation sets, tokens, batch and sequence length, and parameters, total and
active, within 1 %. Runs of one model differ in seed and learning rate; any other difference makes
another model with its own label.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from megapoly.activations import registry
from megapoly.config.schema import ModelConfig
from megapoly.study.report.groups import Entry, RunGroup, describe_options, options_of
from megapoly.study.report.runs import Run

# Largest difference of parameters within a group, relative to the smallest model.
TOLERANCE = 0.01


def group_runs(runs: Iterable[Run], reference: str) -> list[RunGroup]:
    """Return the groups of the complete runs; dense ones first, then those with the most runs.

    Args:
        runs: complete or not. A diverged one counts for the line of its model.
        reference: activation.
    """
    by_key: dict[str, list[Run]] = {}
    runs = list(runs)
    for run in runs:
        if run.complete:
            by_key.setdefault(json.dumps(_key(run), sort_keys=True), []).append(run)
    parts = [part for group in by_key.values() for part in _of_equal_size(group)]
    parts.sort(key=lambda part: (_is_moe(part[0]), -len(part)))
    groups: list[RunGroup] = []
    for part in parts:
        kind = "moe" if _is_moe(part[0]) else "dense"
        number = 1 + sum(group.moe == _is_moe(part[0]) for group in groups)
        slug = kind if number == 1 else f"{kind}_{number}"
        diverged = [r for r in runs if r.diverged and not r.complete and _belongs(r, part)]
        groups.append(_group(slug, part, diverged, reference))
    return groups


def _belongs(run: Run, part: Sequence[Run]) -> bool:
    """Return whether a run without a last step is a trial of the comparison of ``part``.

    It may lack a checkpoint, and with it the fingerprints of its data.
    """
    without_data = {"training data": None, "data known by": None}
    return any(
        run.comparison == other.comparison
        and _key(run) | without_data == _key(other) | without_data
        and _of_one_size(run, other)
        for other in part
    )


def _is_moe(run: Run) -> bool:
    return bool(run.config["model"]["num_moe_experts"])


def _key(run: Run) -> dict[str, Any]:
    """Return what all runs of a group share, apart from the size."""
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
        "steps": run.steps,
        "sequences of a batch": training["global_batch_size"],
        "tokens of a sequence": training["seq_length"],
    }


def _of_equal_size(runs: Sequence[Run]) -> list[list[Run]]:
    parts: list[list[Run]] = []
    for run in sorted(runs, key=lambda run: (run.parameters, run.active_parameters)):
        for part in parts:
            if _of_one_size(run, part[0]):
                part.append(run)
                break
        else:
            parts.append([run])
    return parts


def _of_one_size(run: Run, other: Run) -> bool:
    return _near(run.parameters, other.parameters) and _near(
        run.active_parameters, other.active_parameters
    )


def _near(count: int, other: int) -> bool:
    return abs(count - other) <= TOLERANCE * min(count, other)


def _group(slug: str, runs: list[Run], diverged: list[Run], reference: str) -> RunGroup:
    own = _own_options(runs, [*runs, *diverged])
    models: dict[str, list[Run]] = {}
    lost: dict[str, dict[float, list[str]]] = {}
    for run in runs:
        models.setdefault(_model(run, own), []).append(run)
    for run in diverged:
        lost.setdefault(_model(run, own), {}).setdefault(run.lr, []).append(run.seed)
    repeated: list[tuple[Run, Run]] = []
    entries = [
        _entry(
            members,
            own[members[0].key],
            lost.get(model, {}),
            repeated,
            _several_orders(runs, members[0]),
        )
        for model, members in models.items()
    ]
    entries.sort(key=_place)
    first = [entry for entry in entries if entry.activation == reference]
    group_key = {**_key(runs[0]), "parameters": runs[0].parameters}
    if _is_moe(runs[0]):
        group_key["active parameters"] = runs[0].active_parameters
    return RunGroup(
        slug=slug,
        moe=_is_moe(runs[0]),
        key=group_key,
        entries=entries,
        reference=next((e for e in first if e.plain), first[0] if first else None),
        repeated=repeated,
        varied=sorted({name for run in runs for name in own[run.key]}),
    )


def _own_options(complete: Sequence[Run], runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """Return, by key of a run, its options that differ from most of the complete runs."""
    options = {run.key: options_of(run) for run in runs}
    for name in ("min_lr", "lr_warmup_init"):  # one choice if it is proportional to the rate
        rates = {round(run.config["optimizer"].get(name, 0.0) / run.lr, 6) for run in complete}
        for values in options.values() if len(rates) == 1 else []:
            values.pop(f"optimizer.{name}", None)
    base = {}
    for name in {name for values in options.values() for name in values}:
        present = [json.dumps(v[name]) for run in complete if name in (v := options[run.key])]
        base[name] = json.loads(Counter(present).most_common(1)[0][0]) if present else None
    return {
        key: {name: values[name] for name in sorted(values) if values[name] != base[name]}
        for key, values in options.items()
    }


def _model(run: Run, own: dict[str, dict[str, Any]]) -> str:
    return json.dumps([run.activation, _order(run), own[run.key]])


def _entry(
    members: Sequence[Run],
    variant: dict[str, Any],
    diverged: dict[float, list[str]],
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
    title = registry.get(activation).title or activation
    if order is not None and (several_orders or order != ModelConfig.activation_order):
        title += f" r={order}"
    label = f"{title}; {describe_options(variant)}" if variant else title
    return Entry(activation, order, variant, title, label, list(kept.values()), diverged)


def _several_orders(runs: Iterable[Run], of: Run) -> bool:
    return len({_order(run) for run in runs if run.activation == of.activation}) > 1


def _place(entry: Entry) -> tuple[int, int, bool, str]:
    position = list(registry.ACTIVATIONS).index(entry.activation)
    return position, entry.order or 0, not entry.plain, entry.label


def _order(run: Run) -> int | None:
    polynomial = registry.get(run.activation).has_coefficients
    return int(run.config["model"]["activation_order"]) if polynomial else None
