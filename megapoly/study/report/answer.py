"""The answer of a report in sentences that are computed from the numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megapoly.activations import registry
from megapoly.study.report import results
from megapoly.study.report.cells import signed
from megapoly.study.report.content import Content
from megapoly.study.report.grouping import group_runs
from megapoly.study.report.groups import Entry, RunGroup, describe_options, final_loss
from megapoly.study.report.results import Difference


def subject(group: RunGroup) -> Entry | None:
    """Return the entry that the answer is about: the paper's strongest form or the nearest to it.

    That is the first normalised, ungated polynomial of the group, else its first polynomial.
    """
    polynomials = [entry for entry in group.main if entry.order is not None]

    def distance(entry: Entry) -> int:
        activation = registry.get(entry.activation)
        return 2 * activation.gated + (not activation.normalized)

    return min(polynomials, key=distance) if polynomials else None


def answer(group: RunGroup) -> list[str]:
    """Compare the subject with every fixed activation, and rank all entries, in sentences."""
    about = subject(group)
    sentences = []
    if about is not None:
        fixed = [entry for entry in group.main if entry.order is None]
        sentences += _against(about, fixed, group.ranked_by) if fixed else []
        for variant in group.entries:
            if not variant.plain and variant.activation == about.activation:
                sentences += _of_variant(variant, group)
    if len(group.entries) > 1:
        sentences.append(_ranking(group))
    return list(dict.fromkeys(sentences))


def _of_variant(variant: Entry, group: RunGroup) -> list[str]:
    """Compare the subject with other options with fixed activations that have the same options."""
    fixed = [e for e in group.entries if e.order is None and e.variant == variant.variant]
    if not fixed:
        return []
    return _against(
        variant, fixed, group.ranked_by, f"With {describe_options(variant.variant)}: in"
    )


def answers(content: Content) -> str:
    """Return the answers of all groups as text."""
    groups = group_runs(content.runs, content.reference)
    return "\n".join(f"{group.kind}: {' '.join(answer(group))}" for group in groups)


def _against(about: Entry, fixed: Sequence[Entry], kind: str, beginning: str = "In") -> list[str]:
    found = {entry.title: results.difference(about, entry) for entry in fixed}
    known = {label: item for label, item in found.items() if item is not None}
    reason = "no seed is shared, or a run has no finite loss"
    if not known:
        return [f"{about.label} cannot be compared with any fixed activation: {reason}."]
    lost = [label for label in found if label not in known]
    below = {label: item for label, item in known.items() if item.spread.mean < 0}
    rest = {label: item for label, item in known.items() if label not in below}
    verb = "ends" if below else "does not end"
    amounts = [
        f"{label} ({_amount(i, signed(i.spread.mean, 3))}{_lower(i)})" for label, i in rest.items()
    ]
    parts = [_below(below)] if below else []
    if rest:
        parts.append(("not below " if below else "below ") + _list(amounts))
    text = f"{beginning} {kind} loss {about.title} {verb} {', and '.join(parts)}."
    if lost:
        text += f" It cannot be compared with {_list(lost)}: {reason}."
    if max(item.spread.count for item in known.values()) == 1:
        return [text, "A single seed does not show how much the results vary."]
    single = [label for label, item in known.items() if item.spread.count == 1]
    unclear = [label for label in known if label not in single and not known[label].clear]
    if single:
        text += f" It shares only one seed with {_list(single)}."
    if unclear:
        text += (
            f" {about.title} cannot be distinguished from {_list(unclear)}: the 95\u00a0% interval "
            "of the difference (Student's t) contains zero."
        )
    return [text, "± is the standard error of the differences between runs of the same seed."]


def _below(found: Mapping[str, Difference]) -> str:
    """Write ``SwiGLU by 0.031 ± 0.004 and GELU by ..``, with equal numbers of seeds only once."""
    counts = {_count(item) for item in found.values()}
    same = counts.pop() if len(counts) == 1 else None
    amounts = [
        f"{label} by {_amount(item, f'{-item.spread.mean:.3f}')}"
        + (_count(item) if same is None else "")
        for label, item in found.items()
    ]
    each = "" if not same else f", each{same}" if len(amounts) > 1 else f",{same}"
    return "below " + _list(amounts) + each


def _amount(item: Difference, mean: str) -> str:
    error = item.spread.error
    return mean if error is None else f"{mean}\u00a0±\u00a0{error:.3f}"


def _count(item: Difference) -> str:
    count = item.spread.count
    return "" if count == 1 else f" in {item.below} of {count} seeds"


def _lower(item: Difference) -> str:
    return f", lower{_count(item)}" if item.spread.count > 1 else ""


def _ranking(group: RunGroup) -> str:
    ranked = []
    for entry in group.entries:
        mean = results.known(results.values(entry, final_loss))
        if mean is not None:
            ranked.append((mean.mean, entry.label))
    lost = len(group.entries) - len(ranked)
    ranked.sort()
    order = " < ".join(f"{label} {mean:.3f}" for mean, label in ranked)
    return f"Final {group.ranked_by} losses in order: {order}." + (
        f" {lost} more ended without a finite loss." if lost else ""
    )


def _list(items: Sequence[str]) -> str:
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)
