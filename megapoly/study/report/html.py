"""The page: one HTML file that needs nothing besides itself."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup, escape

from megapoly.study.report import paper
from megapoly.study.report.answer import answer
from megapoly.study.report.cells import Cell, Table, duration
from megapoly.study.report.content import FILE, Content
from megapoly.study.report.figures import THEORY, Picture, pictures
from megapoly.study.report.grouping import TOLERANCE, group_runs
from megapoly.study.report.groups import RunGroup
from megapoly.study.report.run_tables import own_options
from megapoly.study.report.runs import Run, source_name
from megapoly.study.report.style import colour_variables, lifted_variables, png, svg
from megapoly.study.report.tables import tables

_TOOL = "megapoly report"


@dataclass(frozen=True)
class Drawn:
    """A figure on the page.

    Args:
        picture: what it is.
        svg: the drawing.
        command: draws it again.
    """

    picture: Picture
    svg: Markup
    command: str


def render(content: Content, folder: Path, recipes: Path) -> tuple[str, dict[str, bytes]]:
    """The page and its figures.

    Args:
        content: of report.json.
        folder: that the page will lie in, as commands name it.
        recipes: folder with the paper's configurations.

    Returns:
        HTML, and PNG files by name.
    """
    groups = group_runs(content.runs, content.reference)
    drawn, files = [], {}
    for picture in pictures(content):
        # A figure each: saving lays it out, at the resolution that it is saved at.
        files[picture.name] = png(picture.figure())
        description = f"{picture.title}. {picture.caption}"
        drawing = Markup(svg(picture.figure(), picture.name, description))
        drawn.append(Drawn(picture, drawing, command(folder, picture.name)))
    environment = Environment(
        loader=PackageLoader("megapoly.study.report", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["unbroken"] = _unbroken
    light, dark = colour_variables()
    page = environment.get_template("index.html").render(
        content=content,
        sections=[_section(group, groups, drawn, recipes) for group in groups],
        theory=[d for d in drawn if d.picture.section == THEORY],
        theory_command=f"megapoly theory --output {content.theory_folder}",
        notes=_notes(content.notes),
        unfinished=[_unfinished(run) for run in content.runs if not run.complete],
        comparisons=[_comparison(key, content) for key in content.comparisons],
        remake=f"{_TOOL} {shlex.quote(str(folder / FILE))} --output {shlex.quote(str(folder))}",
        light=light,
        dark=dark | lifted_variables(str(d.svg) for d in drawn),
        wall_time=duration(sum(run.wall_time_s for run in content.runs)),
    )
    return page, files


def command(folder: Path, name: str) -> str:
    """The command that draws a figure again."""
    words = [str(folder / FILE), "--figures", name, "--output", str(folder)]
    return f"{_TOOL} {shlex.join(words)}"


def _unbroken(text: str) -> Markup:
    """A command whose options stay in one line each."""
    words = [
        Markup("<span>{}</span>").format(word) if word.startswith("-") else escape(word)
        for word in text.split(" ")
    ]
    return Markup(" ").join(words)


def _section(
    group: RunGroup, groups: Sequence[RunGroup], drawn: Sequence[Drawn], recipes: Path
) -> dict[str, Any]:
    run = group.runs[0]
    return {
        "slug": group.slug,
        "title": _title(group, groups),
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
        "paper": _against_paper(group, recipes),
        "repeated": [f"{old.name}, for {new.name}" for old, new in group.repeated],
    }


def _title(group: RunGroup, groups: Sequence[RunGroup]) -> str:
    """The kind of model, with its size where there are several groups of a kind."""
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
    """The first thing that differs."""
    name = next(name for name, value in group.key.items() if value != other.key[name])
    value = group.key[name]
    return f"{value:,} {name}" if isinstance(value, int) else f"other {name}"


def _equal(group: RunGroup) -> str:
    """What all runs of the group share."""
    run, sizes = group.runs[0], [run.parameters for run in group.runs]
    difference = max(sizes) - min(sizes)
    size = f"{paper.short(run.parameters)} parameters"
    if group.moe:
        size += f" ({paper.short(run.active_parameters)} active)"
    known = "as their checkpoints say" if run.data else "as their configurations say"
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
        + (f"which differ by {difference:,} at most." if difference else "the same in all.")
    )


def _apart(group: RunGroup, groups: Sequence[RunGroup]) -> str | None:
    """Why it is not compared with the first group of its kind."""
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
            f"Apart from the first group of this kind: {' and '.join(sizes)} differ by more than "
            f"{TOLERANCE:.0%}."
        )
    return f"Apart from the first group of this kind, which has other {', '.join(names)}."


def _common(group: RunGroup) -> str:
    """What is equal in all configurations, as YAML."""
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
    """Sources of the training data, with how often the run reads each."""
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
        [] if run.data else ["No checkpoint tells shares and fingerprints of the files."],
    )


def _fingerprints(group: RunGroup) -> list[tuple[str, str]]:
    """Fingerprint of the sequence of samples, by seed."""
    return sorted({(run.seed, run.data["fingerprint"]) for run in group.runs if run.data})


def _tokenizer(run: Run) -> str:
    name = run.config["data"]["tokenizer"] or "the built-in one"
    text = f"{name}, {run.config['model']['vocab_size']:,} ids"
    return text + (f", SHA-256 {run.data['tokenizer'][:16]}.." if run.data else "")


def _against_paper(group: RunGroup, recipes: Path) -> list[tuple[str, str, str]]:
    """Rows of what is here and what is in the paper; equal ones are left out."""
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
    return [(name, here[name], there[name]) for name in here if here[name] != there[name]]


def _processes(run: Run) -> str:
    count = run.layout["world_size"] if run.layout else None
    device = "GPU" if run.config["training"]["device"] == "cuda" else "CPU"
    return f"{count} x {device}" if count else device


def _analysis_notes(group: RunGroup) -> list[tuple[str, str]]:
    """How each analysis was made: its command and methods."""
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
    """A comparison's command, machine and versions."""
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
    # Pictures would lie outside of the page.
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table").disable("image")
    return Markup(markdown.render(text)) if text else Markup("")
