"""The answer of a report in sentences that are computed from the numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from megapoly.activations import registry
from megapoly.study.report import results
from megapoly.study.report.cells import listed, signed
from megapoly.study.report.content import Content
from megapoly.study.report.grouping import group_runs
from megapoly.study.report.groups import Entry, RunGroup, describe_options, final_loss
from megapoly.study.report.ranking import Ranking, ranking_of, rankings, unranked
from megapoly.study.report.run_tables import untuned

# A sentence names this many lines at most; the tables name all.
_MOST_NAMED = 4
_NBSP = "\u00a0"


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
    """Return sentences: the best lines, the subject's place, and what limits the comparison."""
    if len(group.entries) < 2:
        return []
    found, about = rankings(group), subject(group)
    sentences = []
    for ranking in found:
        sentences.append(_best(ranking, group.ranked_by))
        if about is not None and about in ranking and about is not ranking.entries[0]:
            sentences.append(_place(about, ranking))
    if found:
        sentences.append(_interval(found))
    else:
        sentences += _without_ranking(group)
    if about is not None:
        sentences += _variants(about, group, found)
    return [*sentences, *_limits(group, found)]


def answers(content: Content) -> str:
    """Return the answers of all groups as text."""
    groups = group_runs(content.runs, content.reference)
    return "\n".join(f"{group.kind}: {' '.join(answer(group))}" for group in groups)


def _best(ranking: Ranking, kind: str) -> str:
    """Say which lines may be the best, and by how much the best is below the others."""
    best, limit = ranking.entries[0], f"{ranking.fit.half_interval:.3f}"
    where = f"On {ranking.seed_names}, "
    if not ranking.bold:
        names = _named(ranking.entries, lambda e: f"{e.label} {ranking.mean(e):.3f}", "lines")
        return (
            f"{where}no two of {names} can be distinguished by {kind} loss: the largest "
            f"difference is {_largest(ranking):.3f}, and it must exceed {limit}."
        )
    rest = [entry for entry in ranking.entries if entry not in ranking.leaders]
    below = _named(
        rest,
        lambda e: f"{e.label} by {-ranking.difference(best, e):.3f}",
        f"other lines by {-ranking.difference(best, rest[0]):.3f} or more",
    )
    below += f" ({'each ' * (len(rest) > 1)}±{_NBSP}{limit}, simultaneous 95{_NBSP}%)"
    text = f"{where}{best.label} has the lowest {kind} loss, {ranking.mean(best):.3f}"
    near = ranking.leaders[1:]
    if not near:
        return f"{text}: below {below}."
    names = _named(near, lambda e: f"{e.label} ({ranking.mean(e):.3f})", "other lines")
    return f"{text}; it ends below {below}, but cannot be distinguished from {names}."


def _largest(ranking: Ranking) -> float:
    return ranking.difference(ranking.entries[-1], ranking.entries[0])


def _place(about: Entry, ranking: Ranking) -> str:
    """Say which lines the subject is below, above, and cannot be distinguished from."""
    others = [entry for entry in ranking.entries if entry is not about]

    def gap(entry: Entry) -> str:
        return f"{entry.label} by {abs(ranking.difference(about, entry)):.3f}"

    def shown(entry: Entry) -> str:
        return f"{entry.label} ({signed(ranking.difference(about, entry), 3)})"

    clear = [entry for entry in others if ranking.distinguished(about, entry)]
    below = [entry for entry in clear if ranking.difference(about, entry) < 0]
    above = [entry for entry in clear if ranking.difference(about, entry) > 0]
    open_ = [entry for entry in others if entry not in clear]
    parts = []
    if below:
        parts.append(f"ends below {_named(below, gap, 'lines')}")
    if above:
        parts.append(f"ends above {_named(above, gap, 'lines')}")
    if open_:
        parts.append(f"cannot be distinguished from {_named(open_, shown, 'lines')}")
    return f"There {about.label}, {ranking.mean(about):.3f}, {listed(parts)}."


def _interval(found: Sequence[Ranking]) -> str:
    """Say what the intervals are, and what pairing by seed is worth."""
    parts = []
    for ranking in found:
        correlation = ranking.fit.correlation
        if correlation is not None:
            parts.append(f"{signed(correlation, 2)} over {ranking.seed_names}")
    text = (
        "± is half of the simultaneous 95\u00a0% interval (Tukey) of the differences of all lines "
        "of a ranking, from one model of line and seed with one variance for all."
    )
    if not parts:
        return text
    text += f" The correlation between runs of one seed is {listed(parts)}"
    first = found[0].fit.correlation
    if first is None or first <= 0:
        return f"{text}. At zero or below, pairing by seed narrows no difference."
    return (
        f"{text}. Pairing by seed makes the standard error of a difference "
        f"{math.sqrt(1 - first):.2f} of what it is without{', in the first' * (len(parts) > 1)}."
    )


def _without_ranking(group: RunGroup) -> list[str]:
    """List the losses of a seed that all lines have, if there is one, and say what is missing."""
    finite = [entry for entry in group.entries if None not in map(final_loss, entry.seeds.values())]
    lost = len(group.entries) - len(finite)
    shared = set.intersection(*(set(entry.seeds) for entry in finite)) if finite else set()
    sentences = []
    if len(finite) > 1 and shared:
        seed = min(shared)
        losses = sorted(
            (loss, entry.label)
            for entry in finite
            if (loss := final_loss(entry.seeds[seed])) is not None
        )
        order = ", ".join(f"{label} {loss:.3f}" for loss, label in losses)
        sentences.append(f"Final {group.ranked_by} losses with seed {seed}: {order}.")
    sentences.append(
        "No two lines share two seeds with finite losses, so how much results vary is unknown, and "
        "no line is called the best."
    )
    if lost:
        sentences.append(f"{lost} {'line' if lost == 1 else 'lines'} ended without a finite loss.")
    return sentences


def _variants(about: Entry, group: RunGroup, found: list[Ranking]) -> list[str]:
    """Compare the subject with other options with the reference that has the same options."""
    sentences = []
    for entry in group.entries:
        other = group.reference_for(entry)
        if entry.plain or entry.activation != about.activation or other is None:
            continue
        gap = results.difference(entry, other)
        if other.variant != entry.variant or gap is None:
            continue
        ranking = ranking_of(found, entry, other)
        text = f"With {describe_options(entry.variant)}, {about.title} minus {other.title} is "
        text += signed(gap.mean, 3)
        if ranking is None:
            text += f" in {'one seed' if gap.count == 1 else f'{gap.count} seeds'}, not ranked"
        else:
            text += f"{_NBSP}±{_NBSP}{ranking.fit.half_interval:.3f} over {ranking.seed_names}"
            if not ranking.distinguished(entry, other):
                text += ", which cannot be distinguished from zero"
        sentences.append(f"{text}.")
    return sentences


def _limits(group: RunGroup, found: list[Ranking]) -> list[str]:
    """Name the lines that are not ranked, and those whose learning rate was not tuned."""
    sentences = []
    if found:
        reasons: dict[str, list[str]] = {}
        for label, reason in unranked(group, found).items():
            reasons.setdefault(reason, []).append(label)
        sentences += [
            f"Not ranked ({reason}): {listed(labels)}." for reason, labels in reasons.items()
        ]
    return [*sentences, *untuned(group)]


def _named(entries: Sequence[Entry], show: Callable[[Entry], str], rest: str) -> str:
    """Show each of a few lines; of many say their number."""
    if len(entries) > _MOST_NAMED:
        return f"{len(entries)} {rest}"
    return listed([show(entry) for entry in entries])
