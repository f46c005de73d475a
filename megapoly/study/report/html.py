"""The page: one HTML file that loads nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup, escape

from megapoly.study.figure_style import png
from megapoly.study.report import paper
from megapoly.study.report.answer import answer
from megapoly.study.report.cells import Cell, Table, duration
from megapoly.study.report.content import FILE, Content
from megapoly.study.report.figures import THEORY, Picture, pictures, slug
from megapoly.study.report.grouping import TOLERANCE, group_runs
from megapoly.study.report.groups import RunGroup
from megapoly.study.report.run_tables import own_options
from megapoly.study.report.runs import Run, source_name
from megapoly.study.report.svg import colour_variables, lifted_variables, svg
from megapoly.study.report.tables import tables

# Run in the folder of the page, so that the page does not depend on where that is.
_COMMAND = f"megapoly report {FILE}"
# Height over width from which a figure is not made smaller to print several on a page.
_TALL = 2.2


@dataclass(frozen=True)
class Drawn:
    """A figure on the page.

    Args:
        picture: figure of the report.
        svg: its drawing.
        tall: whether it needs the height of a printed page.
        command: command that draws it again.
    """

    picture: Picture
    svg: Markup
    tall: bool
    command: str


def render(content: Content, recipes: Path) -> tuple[str, dict[str, bytes]]:
    """Return the page and its figures.

    Args:
        content: of report.json.
        recipes: folder with the paper's configurations.

    Returns:
        HTML, and the content of PNG files by name. Both depend on nothing but the arguments: two
        builds are equal byte for byte.
    """
    groups = group_runs(content.runs, content.reference)
    drawn, files = [], {}
    for picture in pictures(content):
        # Two figures, because saving lays a figure out for the resolution at which it is saved.
        files[picture.name] = png(picture.figure())
        figure = picture.figure()
        width, height = figure.get_size_inches()
        drawing = svg(figure, picture.name, f"{picture.title}. {picture.caption}")
        command = f"{_COMMAND} --figures {picture.name} --output ."
        drawn.append(Drawn(picture, Markup(drawing), height > _TALL * width, command))
    environment = Environment(
        loader=PackageLoader("megapoly.study.report", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"unbroken": _unbroken, "breakable": _breakable, "slug": slug}
    light, dark = colour_variables()
    sections = [_section(group, groups, drawn, recipes) for group in groups]
    theory = [d for d in drawn if d.picture.section == THEORY]
    page = environment.get_template("index.html").render(
        content=content,
        sections=sections,
        contents=_contents(content, sections, theory),
        theory=theory,
        theory_command=f"megapoly theory --output {content.theory_folder}",
        notes=_notes(content.notes),
        unfinished=[_unfinished(run) for run in content.runs if not run.complete],
        comparisons=[_comparison(key, content) for key in content.comparisons],
        remake=f"{_COMMAND} --output .",
        light=light,
        dark=dark | lifted_variables(str(d.svg) for d in drawn),
        wall_time=duration(sum(run.wall_time_s for run in content.runs)),
    )
    return page, files


def _contents(
    content: Content, sections: Sequence[dict[str, Any]], theory: Sequence[Drawn]
) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """Return id and title of each section, and of its tables and figures."""
    found: list[tuple[str, str, list[tuple[str, str]]]] = []
    if content.notes:
        found.append(("findings", "Findings", []))
    for section in sections:
        name = section["slug"]
        inner = [(f"{name}_table_{slug(t.title)}", t.title) for t in section["tables"]]
        found.append((name, section["title"], [*inner, *_links(section["figures"])]))
        if section["analyses"]:
            inner = _links(section["analyses"])
            found.append((f"{name}_analysis", f"{section['title']}, inside", inner))
    if theory:
        found.append(("theory", "Theory", _links(theory)))
    return [*found, ("made", "How this was made", [])]


def _links(drawn: Sequence[Drawn]) -> list[tuple[str, str]]:
    return [(each.picture.name, each.picture.title) for each in drawn]


def _unbroken(text: str) -> Markup:
    """Return a command in which no line breaks within an option."""
    arguments = [
        Markup("<span>{}</span>").format(each) if each.startswith("-") else escape(each)
        for each in text.split(" ")
    ]
    return Markup(" ").join(arguments)


def _breakable(name: str) -> Markup:
    """Return a name that may break after each underscore."""
    return escape(name).replace("_", Markup("_<wbr>"))


def _section(
    group: RunGroup, groups: Sequence[RunGroup], drawn: Sequence[Drawn], recipes: Path
) -> dict[str, Any]:
    run, title = group.runs[0], _title(group, groups)
    return {
        "slug": group.slug,
        "title": title,
        "answer": answer(group),
        "equal": _equal(group),
        "apart": _apart(group, groups),
        "tables": tables(group),
        "figures": [d for d in drawn if d.picture.section == group.slug],
        "analyses": [d for d in drawn if d.picture.section == f"{group.slug}_analysis"],
        "analysis_notes": _analysis_notes(group),
        "own": own_options(group),
        "configuration": _common(group),
        "data": _data(group),
        "fingerprints": _fingerprints(group),
        "tokenizer": _tokenizer(run),
        "paper": _against_paper(group, title, recipes),
        "repeated": [f"{old.name}, for {new.name}" for old, new in group.repeated],
    }


def _title(group: RunGroup, groups: Sequence[RunGroup]) -> str:
    """Return the kind of model, with its size if there are several groups of a kind."""
    kind = "Mixture of experts" if group.moe else "Dense"
    run = group.runs[0]
    if sum(other.moe == group.moe for other in groups) == 1:
        return kind
    size = f"{kind}, {paper.short(run.parameters)} parameters, {paper.short(run.tokens)} tokens"
    for other in groups[: groups.index(group)]:
        alike = other.runs[0]
        if other.moe == group.moe and (
            paper.short(alike.parameters),
            alike.tokens,
        ) == (paper.short(run.parameters), run.tokens):
            return f"{size}, {_difference(group, other)}"
    return size


def _difference(group: RunGroup, other: RunGroup) -> str:
    """Describe the first difference between two groups."""
    name = next(name for name, value in group.key.items() if value != other.key[name])
    value = group.key[name]
    return f"{value:,} {name}" if isinstance(value, int) else f"other {name}"


def _equal(group: RunGroup) -> str:
    """Describe what all runs of the group share."""
    run, sizes = group.runs[0], [run.parameters for run in group.runs]
    difference = max(sizes) - min(sizes)
    size = f"{paper.short(run.parameters)} parameters"
    if group.moe:
        size += f" ({paper.short(run.active_parameters)} active)"
    known = "according to their checkpoints" if run.data else "according to their configurations"
    orders: dict[str, set[str]] = {}
    for each in group.runs:
        orders.setdefault(each.seed, set()).add(str(each.data and each.data["fingerprint"]))
    order = "in the same order for each seed"
    if any(len(found) > 1 for found in orders.values()):
        order = "but not in the same order in all runs of a seed"
    return (
        f"{len(group.runs)} runs on the same data {order} ({known}), "
        f"{run.tokens:,} tokens in {run.steps:,} steps of "
        f"{run.config['training']['global_batch_size']} sequences, and {size}, "
        + (f"which differ by at most {difference:,}." if difference else "the same in all.")
    )


def _apart(group: RunGroup, groups: Sequence[RunGroup]) -> str | None:
    """Say why the group is not compared with the first group of its kind."""
    first = next(other for other in groups if other.moe == group.moe)
    if first is group:
        return None
    names = [name for name, value in group.key.items() if value != first.key[name]]
    sizes = [
        f"{name} ({group.key[name]:,} here, {first.key[name]:,} there)"
        for name in names
        if name.endswith("parameters")
    ]
    if len(sizes) == len(names):
        return (
            f"Not compared with the first group of this kind: {' and '.join(sizes)} differ by more "
            f"than {TOLERANCE:.0%}."
        )
    return f"Not compared with the first group of this kind, which has other {', '.join(names)}."


def _common(group: RunGroup) -> str:
    """Return what is equal in all configurations, as YAML."""
    configs = [run.config for run in group.runs]
    shared: dict[str, Any] = {}
    for section, options in configs[0].items():
        if not isinstance(options, dict):
            continue
        equal = {
            name: value
            for name, value in options.items()
            if all(config[section].get(name) == value for config in configs)
        }
        shared |= {section: equal} if equal else {}
    return str(yaml.safe_dump(shared, sort_keys=False, allow_unicode=True, width=88))


def _data(group: RunGroup) -> Table:
    """Return the sources of the training data, with how often the run reads each."""
    run = group.runs[0]
    if run.data is None:
        blend = run.config["data"]["blend"] or [{"name": "built-in books"}]
        rows = [(source_name(source), [Cell("–")] * 4) for source in blend]
    else:
        rows = [
            (
                source_name(source),
                [
                    Cell(f"{source['share']:.2%}"),
                    Cell(f"{source['tokens']:,}"),
                    Cell(f"{source['share'] * run.tokens / source['tokens']:.3g}"),
                    Cell(str(source["fingerprint"])),
                ],
            )
            for source in run.data["sources"]
        ]
    return Table(
        "Training data",
        ["source", "share", "tokens in its files", "times read", "fingerprint"],
        rows,
        []
        if run.data
        else ["Shares and fingerprints of the files are unknown without a checkpoint."],
    )


def _fingerprints(group: RunGroup) -> list[tuple[str, str]]:
    """Return the fingerprint of the sequence of samples, by seed."""
    return sorted({(run.seed, run.data["fingerprint"]) for run in group.runs if run.data})


def _tokenizer(run: Run) -> str:
    name = run.config["data"]["tokenizer"] or "the built-in one"
    text = f"{name}, {run.config['model']['vocab_size']:,} ids"
    return text + (f", SHA-256 {run.data['tokenizer'][:16]}.." if run.data else "")


def _against_paper(group: RunGroup, title: str, recipes: Path) -> Table:
    """Return the table of what differs from the paper."""
    entry = group.reference or group.entries[0]
    run = next(iter(entry.seeds.values()))
    here = paper.facts(run.config, run.parameters, run.active_parameters)
    rates = sorted({entry.lr for entry in group.entries})
    here["learning rate"] = ", ".join(f"{lr:g}" for lr in rates)
    full = paper.recipe(recipes, group.moe)
    there = paper.facts(full, full["parameters"], full["active"])
    seeds = sorted({len(entry.seeds) for entry in group.entries})
    here["seeds"], there["seeds"] = " or ".join(map(str, seeds)), "one"
    here["hardware"], there["hardware"] = _processes(run), paper.results(group.moe).hardware
    differing = [name for name in here if here[name] != there[name]]
    rows = [(name, [Cell(here[name]), Cell(there[name])]) for name in differing]
    return Table(
        f"{title}: what differs from the paper", ["what", "here", "paper"], rows, is_text=True
    )


def _processes(run: Run) -> str:
    count = run.layout["world_size"] if run.layout else None
    device = "GPU" if run.config["training"]["device"] == "cuda" else "CPU"
    return f"{count} x {device}" if count else device


def _analysis_notes(group: RunGroup) -> list[tuple[str, str]]:
    """Return label and command of each analysis."""
    analysed = [(entry, entry.analysed) for entry in group.entries]
    return [
        (f"{entry.label}, seed {run.seed}", str(run.analysis["command"]))
        for entry, run in analysed
        if run and run.analysis
    ]


def _unfinished(run: Run) -> str:
    how = "diverged after step" if run.diverged else "step"
    return f"{run.name}: {how} {run.iteration:,} of {run.steps:,}"


def _comparison(key: str, content: Content) -> dict[str, Any]:
    """Return commands, machine and versions of a comparison."""
    found = content.comparisons[key]
    runs = [run for run in content.runs if run.comparison == key]
    hardware = found.get("hardware") or {}
    parts = [str(hardware.get("gpu") or ""), str(hardware.get("cpu") or "")]
    machine = ", ".join(part for part in parts if part)
    if hardware.get("cores"):
        machine += f", {hardware['cores']} cores"
    if hardware.get("memory_gib"):
        machine += f", {hardware['memory_gib']:g} GiB memory"
    versions = ", ".join(f"{name} {v}" for name, v in (found.get("versions") or {}).items())
    return {
        "name": key,
        "commands": found["commands"],
        "machine": machine or "not recorded",
        "versions": versions or "not recorded",
        "wall_time": duration(sum(run.wall_time_s for run in runs)),
        "trials": len(runs),
    }


def _notes(text: str) -> Markup:
    # Images would be files outside of the page.
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table").disable("image")
    return Markup(markdown.render(text)) if text else Markup("")
