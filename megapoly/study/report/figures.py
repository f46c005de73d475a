"""Figures of a report by name; each depends only on the content of report.json."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from matplotlib.figure import Figure

from megapoly.activations import registry
from megapoly.errors import DataError
from megapoly.study.figure_style import drawing
from megapoly.study.report import end_figures, loss_figures
from megapoly.study.report.content import Content
from megapoly.study.report.grouping import group_runs
from megapoly.study.report.groups import Entry, RunGroup
from megapoly.study.report.loss_figures import Curves

THEORY = "theory"
# Activations of one figure in section 4.4 of the paper.
_RELU_VARIANTS = ("relu", "squared_relu", "polyrelu")


@dataclass(frozen=True)
class Picture:
    """A figure of a report.

    Args:
        name: of its file, and for ``--figures``.
        title: heading on the page.
        caption: description of what is drawn.
        section: of the page: slug of the group, the slug with ``_analysis``, or ``theory``.
        draw: function that draws it.
    """

    name: str
    title: str
    caption: str
    section: str
    draw: Callable[[], Figure]

    def figure(self) -> Figure:
        """Draw the figure as the page shows it."""
        with drawing():
            figure = self.draw()
            # The page has title and command next to the figure.
            figure.suptitle("").set_visible(False)
            if self.section == THEORY:
                figure.supxlabel("").set_visible(False)
            return figure


def pictures(content: Content) -> list[Picture]:
    """Return all figures for which the report has the runs, in the order of the page."""
    groups = group_runs(content.runs, content.reference)
    found = [picture for group in groups for picture in _of_group(group)]
    found += [picture for group in groups for picture in _of_analyses(group)]
    return [*found, *_of_theory(content)]


def chosen(content: Content, names: Iterable[str]) -> list[Picture]:
    """Return figures by name.

    Raises:
        DataError: the report has no figure of that name.
    """
    found = {picture.name: picture for picture in pictures(content)}
    for name in names:
        if name not in found:
            near = difflib.get_close_matches(name, found, n=1, cutoff=0.0)
            raise DataError(
                f"`--figures` ({name}) is not a figure of this report; must be one of "
                f"{', '.join(found)}" + (f"; the nearest is {near[0]}" if near else "")
            )
    return [found[name] for name in names]


def _of_group(group: RunGroup) -> list[Picture]:
    main = group.main
    validated = len(group.runs[0].validation["tokens"]) > 1
    with_reference = group.reference is not None and len(main) > 1
    found = []

    def add(name: str, title: str, caption: str, draw: Callable[[], Figure]) -> None:
        found.append(Picture(f"{group.slug}_{name}", title, caption, group.slug, draw))

    def curves(name: str, title: str, entries: Sequence[Entry], *, validation: bool) -> None:
        spec = Curves(group, entries, validation=validation)
        add(name, title, loss_figures.curves_caption(spec), lambda: loss_figures.curves(spec))

    if any(entry.seeds for entry in group.entries) and group.runs[0].validation["tokens"]:
        add(
            "final_loss",
            "Final validation loss, every seed",
            end_figures.FINAL_CAPTION,
            lambda: end_figures.final_losses(group),
        )
    curves("training_loss", "Training loss", main, validation=False)
    if validated:
        curves("validation_loss", "Validation loss", main, validation=True)
    if with_reference:
        add(
            "tokens_to_reach",
            f"Tokens to reach the final loss of {end_figures.name_of(group)}",
            end_figures.reach_caption(group),
            lambda: end_figures.reaches(group),
        )
        if len(group.runs[0].domains) > 1:
            add(
                "domains",
                "Every domain",
                end_figures.domains_caption(group),
                lambda: end_figures.domains_figure(group),
            )
    for name, title, entries in _ablations(group):
        curves(name, title, entries, validation=False)
    if any(len(entry.rates) > 1 for entry in group.entries):
        add(
            "learning_rates",
            "Learning rates",
            end_figures.rates_caption(group),
            lambda: end_figures.learning_rates(group),
        )
    return found


def _ablations(group: RunGroup) -> list[tuple[str, str, list[Entry]]]:
    """Return order, compositions and variants of ReLU, like Fig. 5, and changed options."""
    plain = [entry for entry in group.entries if entry.plain]
    orders: dict[str, list[Entry]] = {}
    for entry in plain:
        if entry.order is not None:
            orders.setdefault(entry.activation, []).append(entry)
    compositions = [
        entry
        for entry in group.main
        if entry.order is not None and not registry.get(entry.activation).gated
    ]
    named = {entry.activation: entry for entry in group.main}
    relu_variants = [named[name] for name in _RELU_VARIANTS if name in named]
    found = [
        (f"order_{name}", f"Order of {registry.get(name).title}", entries)
        for name, entries in orders.items()
        if len(entries) > 1
    ]
    if len(compositions) > 2:
        found.append(("compositions", "Polynomial compositions", compositions))
    if len(relu_variants) > 2:
        found.append(("relu_variants", "Variants of ReLU", relu_variants))
    changed = [entry for entry in group.entries if not entry.plain]
    for activation in dict.fromkeys(entry.activation for entry in changed):
        entries = [named[activation]] if activation in named else []
        entries += [entry for entry in changed if entry.activation == activation]
        title = registry.get(activation).title
        found.append((f"variants_{activation}", f"{title} with other options", entries))
    return found


def analyses(group: RunGroup) -> list[dict[str, Any]]:
    """Return the analyses of a group's entries, each with its label."""
    analysed = [(entry, entry.analysed) for entry in group.entries]
    return [
        {**run.analysis, "label": entry.label} for entry, run in analysed if run and run.analysis
    ]


def _of_analyses(group: RunGroup) -> list[Picture]:
    from megapoly.study.analysis import figures

    found: list[Picture] = []
    content = analyses(group)

    def add(name: str, title: str, caption: str, draw: Callable[[], Figure]) -> None:
        section = f"{group.slug}_analysis"
        found.append(Picture(f"{group.slug}_{name}", title, caption, section, draw))

    for name, (title, caption) in _ANALYSES.items():
        draw = getattr(figures, name)
        if draw(content) is not None:
            add(name, title, caption, partial(draw, content))
    for name, (title, caption) in _ANALYSES_OF_ONE.items():
        draw = getattr(figures, name)
        for analysis in content:
            if draw(analysis) is not None:
                own = f"{name}_{slug(analysis['label'])}"
                add(own, f"{title}, {analysis['label']}", caption, partial(draw, analysis))
    return found


def slug(label: str) -> str:
    """Return a label as part of a file name or an id."""
    return re.sub(r"[^a-z0-9]+", "_", label.replace("²", "2").lower()).strip("_")


def _of_theory(content: Content) -> list[Picture]:
    if content.theory is None:
        return []
    theory: dict[str, Any] = content.theory
    return [
        Picture(
            f"theory_{name}",
            title,
            caption,
            THEORY,
            partial(_statement, theory, name),
        )
        for name, (title, caption) in _STATEMENTS.items()
    ]


def _statement(theory: dict[str, Any], name: str) -> Figure:
    from megapoly.study.theory import figures

    return figures.draw(theory, name)


_ANALYSES = {
    "effective_rank": (
        "Effective rank of the FFN weights",
        "exp of the entropy of the normalised singular values (Eq. 36) by layer, like Fig. 6; for "
        "experts the mean and the range. A matrix with fewer rows or columns has a lower rank from "
        "the start, and gated FFNs are two thirds as wide: compare gated FFNs with each other.",
    ),
    "similarity": (
        "Similarity of layers",
        "Cosine similarity between the hidden states after any two layers on validation text, "
        "like Fig. 7.",
    ),
    "expert_similarity": (
        "Similarity before and after a layer, by expert",
        "Over the tokens that an expert gets: a dot for each expert, a line at their mean.",
    ),
    "power_shares": (
        "Share of each power in the output",
        "Mean square of each term of the polynomial by layer, as a share of their sum; the darker "
        "the bar, the higher the power.",
    ),
    "activation_statistics": (
        "Outliers and saturation",
        "Statistics of the activations on validation text, by layer.",
    ),
}
_ANALYSES_OF_ONE = {
    "coefficients": (
        "Coefficients through training",
        "One line for each layer, one panel for each power.",
    ),
    "curves": (
        "Activations as learned",
        "Over the pre-activations on validation text; the grey area is their density.",
    ),
}
_STATEMENTS = {
    "theorem_1": (
        "Lemma 1 and Theorem 1",
        "A ReLU network and the PolyReLU network of the same depth and width that equals it.",
    ),
    "lemma_a4": (
        "Lemma A.4",
        "Number of units of the PolyReLU network that equals x to the n, against n.",
    ),
    "lemma_2": (
        "Lemma 2",
        "Size and measured error of ReLU networks that imitate one PolyReLU unit.",
    ),
    "theorem_2": (
        "Theorem 2",
        "The same for whole PolyReLU networks.",
    ),
    "theorem_3": (
        "Theorem 3",
        "Error of approximating smooth functions against the number of parameters. Local Taylor "
        "polynomials, the paper's construction and its copy by ReLU units; dotted: the slope -n/d, "
        "which is that of any network with a fixed number of parameters for each piece of degree "
        "n - 1. Last: splines in one hidden layer, which take a small part of the parameters.",
    ),
}
