"""Write the reference pages about options and commands from the schema and the parsers.

MkDocs runs :func:`on_files` at every build. The pages are in no file and cannot be out of date.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import itertools
import re
import textwrap
from collections.abc import Iterable
from dataclasses import MISSING
from types import ModuleType
from typing import TYPE_CHECKING

import yaml

from megapoly import polynomial
from megapoly.commands import COMMANDS, module_of
from megapoly.commands.benchmark import BENCHMARKS
from megapoly.commands.preprocess import SUBCOMMANDS, subcommand_parser
from megapoly.config.options import OPTIONS, SECTIONS, Option, options_of
from megapoly.config.rules.values import ENTRY_RANGES, RANGES
from megapoly.config.yaml_text import LARGEST_FILE_BYTES, MOST_VALUES

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

# What the options of a command's own parser leave out.
NOTES = {
    "train": "Also every field of the [configuration](configuration.md), `--section.field value`.",
    "launch": "The options are those of torchrun.",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages to those of the folder."""
    from mkdocs.structure.files import File

    for name, content in (("configuration", configuration_page()), ("cli", commands_page())):
        files.append(File.generated(config, f"reference/{name}.md", content=content))
    return files


def on_page_content(html: str, page: object, config: MkDocsConfig, files: Files) -> str:
    """Leave out roles such as ``:func:`` before names; show the values of shared defaults."""
    html = re.sub(r":\w+:(?=<code>)", "", html)
    return re.sub(r"\bDEFAULT_\w+", lambda name: str(getattr(polynomial, name[0])), html)


def configuration_page() -> str:
    """Return a page with the options of each section of the schema."""
    page = [
        "# Configuration",
        "",
        "A recipe is a YAML file with these sections. Every option is also one of the command "
        "line, `--section.field value`, which overrides the recipe. Names are Megatron's where it "
        "has one. `null` means that a value is resolved before training; `--print-config` "
        "prints the resolved configuration.",
        "",
        "Recipes are YAML 1.1, as PyYAML reads it, with three differences: `3e-4` is a number; "
        "`010` and `1:30`, which YAML 1.2 reads as other numbers, are refused; aliases stand for "
        f"at most {MOST_VALUES:,} values. A recipe has at most {LARGEST_FILE_BYTES >> 20} MiB.",
    ]
    for section, title in {"": "The run", **SECTIONS}.items():
        heading = f"`{section}`: {title.partition(';')[0].rstrip('.')}" if section else title
        page += ["", f"## {heading}", *_described(_options(section))]
        for option in _options(section):
            if option.entry is not None:
                page += ["", *_entry(option, option.entry)]
    return "\n".join(page) + "\n"


def _options(section: str) -> list[Option]:
    return [option for key, option in OPTIONS.items() if key.rpartition(".")[0] == section]


def _described(options: Iterable[Option]) -> list[str]:
    """Return a definition list: names with anchors, defaults, kinds of value, meanings."""
    page = []
    for option in options:
        name = f"`{option.key}`{{ #{option.key} }}"
        default = "" if option.default is MISSING else f" = `{_plain(option.default)}`"
        page += ["", f"{name}{default}, {_kind(option)}", f":   {_prose(option.description)}"]
    return page


def _kind(option: Option) -> str:
    """Return what a value must be, without the remarks that an error message adds."""
    kind = re.sub(r" \(.*?\)", "", option.expected)
    section, _, name = option.key.rpartition(".")
    range_ = ENTRY_RANGES.get(name) if section in OPTIONS else RANGES.get(option.key)
    return kind if range_ is None else f"{kind}; {range_}"


def _entry(option: Option, entry: type) -> list[str]:
    """Return the description of the mappings that an option may hold."""
    text = (inspect.getdoc(entry) or "").partition("\nArgs:")[0].strip()
    paragraphs = (["", *_paragraph(each)] for each in re.split(r"\n\n+", text))
    fields = options_of(entry, f"{option.key}.").values()
    return [f"### An entry of `{option.key}`", *itertools.chain(*paragraphs), *_described(fields)]


def commands_page() -> str:
    """Return a page with every command: what it does, and its options."""
    page = [
        "# Commands",
        "",
        "`megapoly COMMAND`, or `python -m megapoly COMMAND`. `megapoly --help` lists the "
        "commands, `megapoly COMMAND --help` prints what is here.",
        "",
        "| command | |",
        "|---|---|",
        *(f"| [`{name}`](#{name}) | {each.summary} |" for name, each in COMMANDS.items()),
    ]
    for name in COMMANDS:
        page += _command(name, module_of(name))
        if name == "preprocess":
            for sub in SUBCOMMANDS:
                described = importlib.import_module(SUBCOMMANDS[sub])
                page += _section(f"preprocess {sub}", described, subcommand_parser(sub), level=3)
        if name == "benchmark":
            for sub in BENCHMARKS:
                measured = importlib.import_module(f"megapoly.benchmarks.{sub}")
                page += _section(f"benchmark {sub}", measured, measured.build_parser(), level=3)
    return "\n".join(page) + "\n"


def _command(name: str, module: ModuleType) -> list[str]:
    build = getattr(module, "build_parser", None)
    page = _section(name, module, None if build is None else build())
    return [*page, "", NOTES[name]] if name in NOTES else page


def _section(
    name: str, module: ModuleType, parser: argparse.ArgumentParser | None, *, level: int = 2
) -> list[str]:
    """Return the section of one command: its module's docstring, as help prints it, and options."""
    anchor = name.replace(" ", "-")
    page = ["", f"{'#' * level} megapoly {name} {{ #{anchor} }}"]
    for paragraph in re.split(r"\n\n+", inspect.getdoc(module) or ""):
        page += ["", *_paragraph(paragraph.strip("\n"))]
    return page if parser is None else [*page, *_arguments(parser)]


def _paragraph(text: str) -> list[str]:
    """Return a docstring's paragraph as Markdown; commands and columns keep their layout."""
    if text.startswith("    "):
        language = "bash" if "megapoly" in text else "text"
        return [f"```{language}", textwrap.dedent(text), "```"]
    if re.search(r"^\S+ {2,}\S", text, re.MULTILINE):
        return ["```text", text, "```"]
    return [_prose(text)]


def _arguments(parser: argparse.ArgumentParser) -> list[str]:
    page = []
    for group in parser._action_groups:
        own = [_argument(parser, action) for action in group._group_actions if _is_own(action)]
        if own and group.title not in ("positional arguments", "options"):
            page += ["", f"**{_prose(group.title or '')}**"]
        page += itertools.chain(*own)
    return page


def _is_own(action: argparse.Action) -> bool:
    """Return whether an option is the command's, neither `--help` nor one of the configuration."""
    hidden = action.help == argparse.SUPPRESS or "--help" in action.option_strings
    return not hidden and action.dest not in OPTIONS


def _argument(parser: argparse.ArgumentParser, action: argparse.Action) -> list[str]:
    text = (action.help or "") % {"default": action.default, "prog": parser.prog}
    remark = " (required)" if action.required and action.option_strings else ""
    return ["", f"`{_invocation(action)}`{remark}", f":   {_prose(text)}"]


def _invocation(action: argparse.Action) -> str:
    """Return the flag with the name of its value, as help shows it."""
    names = ", ".join(action.option_strings)
    if action.nargs == 0:
        return names
    value = action.metavar or (action.dest if not names else action.dest.upper())
    if action.choices is not None and action.metavar is None:
        value = "{" + ",".join(map(str, action.choices)) + "}"
    value = " ".join(value) if isinstance(value, tuple) else str(value)
    more = " ..." if action.nargs in ("+", "*") else ""
    return f"{names} {value}{more}".strip()


def _prose(text: str) -> str:
    """Return a sentence of a docstring as one line of Markdown."""
    text = re.sub(r":\w+:`", "`", " ".join(text.split()).replace("``", "`"))
    parts = text.split("`")
    # Outside code, what Markdown would take for markup.
    parts[::2] = [part.replace("<", "&lt;").replace("*", r"\*") for part in parts[::2]]
    return "`".join(parts)


def _plain(value: object) -> str:
    """Return a default as YAML has it."""
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
