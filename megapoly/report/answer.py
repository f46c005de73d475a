"""The answer in sentences, each of its words decided by the numbers."""

from __future__ import annotations

from collections.abc import Sequence

from megapoly.activations import registry
from megapoly.report import results
from megapoly.report.groups import Entry, Group, final_loss
from megapoly.report.results import Difference
from megapoly.report.tables import signed


def subject(group: Group) -> Entry | None:
    """The entry that the answer is about: the paper's strongest form, or what is nearest to it.

    That is the first normalised, ungated polynomial of the group, else its first polynomial.
    """
    polynomials = [entry for entry in group.main if entry.order is not None]

    def distance(entry: Entry) -> int:
        activation = registry.get(entry.activation)
        return 2 * activation.gated + (not activation.normalized)

    return min(polynomials, key=distance) if polynomials else None


def answer(group: Group) -> list[str]:
    """One sentence about the subject against every fixed activation, one about the ranking."""
    about = subject(group)
    fixed = [entry for entry in group.main if entry.order is None]
    sentences = []
    if about is not None and fixed:
        sentences.append(_against(about, fixed, _kind(group)))
    if len(group.entries) > 1:
        sentences.append(_ranking(group))
    return sentences


def _kind(group: Group) -> str:
    return "validation" if group.runs[0].validation["tokens"] else "training"


def _against(about: Entry, fixed: Sequence[Entry], kind: str) -> str:
    found = {entry.label: results.difference(about, entry) for entry in fixed}
    known = {label: item for label, item in found.items() if item is not None}
    if not known:
        return f"{about.label} shares no seed with a fixed activation: nothing is compared."
    below = {label: item for label, item in known.items() if item.spread.mean < 0}
    rest = {label: item for label, item in known.items() if label not in below}
    parts = []
    if below:
        parts.append("below " + _list([_one(*item) for item in below.items()]))
    if rest:
        parts.append("not below " + _list([_one(*item) for item in rest.items()]))
    text = f"{about.label} ends {'; it is '.join(parts)} in {kind} loss."
    unclear = [label for label, item in known.items() if not item.clear]
    if max(item.spread.count for item in known.values()) == 1:
        return text + " With one seed nothing is known of the spread."
    if unclear:
        text += f" Against {_list(unclear)} this is within twice its standard error."
    return text


def _one(label: str, item: Difference) -> str:
    error, count = item.spread.error, item.spread.count
    text = f"{label} by {abs(item.spread.mean):.3f}"
    if item.spread.mean >= 0:
        text = f"{label} ({signed(item.spread.mean, 3)}"
    else:
        text += " ("
    if error is not None:
        text += f"± {error:.3f}, " if text.endswith("(") else f" ± {error:.3f}, "
        return text + f"lower in {item.below} of {count} seeds)"
    return text.removesuffix(" (") + (")" if item.spread.mean >= 0 else "")


def _ranking(group: Group) -> str:
    ranked = []
    for entry in group.entries:
        mean = results.known(results.values(entry, final_loss))
        if mean is not None:
            ranked.append((mean.mean, entry.label))
    lost = len(group.entries) - len(ranked)
    ranked.sort()
    order = " < ".join(f"{label} {mean:.3f}" for mean, label in ranked)
    return f"Final {_kind(group)} losses in order: {order}." + (
        f" {lost} more ended without a finite loss." if lost else ""
    )


def _list(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
