"""One page of tables and figures from any set of runs, for a comparison of activations.

    megapoly report runs/comparison --output report --notes findings.md
    megapoly report report/report.json --figures dense_training_loss --output report

Each RUN is a run's folder, a folder of runs at any depth (such as the output of
megapoly compare) or the report.json of an earlier report; several are merged, and of
the same run the later one counts. Written are index.html, which needs nothing besides itself,
report.json, which holds all that it shows, and figures/*.png. With --figures these PNGs alone.

Runs that were not trained alike (data, tokens, batch, size) stand in groups of their own; those
that have not finished are named and left out. See docs/reference/report.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megapoly.config import recipes
from megapoly.config.command_line import Parser, status_of
from megapoly.errors import DataError, UnavailableError
from megapoly.platform.logs import show_errors_only

if TYPE_CHECKING:
    from megapoly.study.report.content import Content

REFERENCE = "swiglu"
TITLE = "Polynomial activations against fixed ones"
_PACKAGES = {"jinja2": "jinja2", "markdown_it": "markdown-it-py", "matplotlib": "matplotlib"}


def main(argv: Sequence[str] | None = None) -> int:
    """Make the page; 2 if something is missing or wrong."""
    options = build_parser().parse_args(argv)
    show_errors_only()
    return status_of(lambda: _report(options))


def build_parser() -> Parser:
    """Return the command's parser."""
    parser = Parser("report", __doc__)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="run, folder of runs or report.json")
    add("--output", required=True, type=Path, metavar="FOLDER", help="made")
    add("--title", help=f"heading of the page ({TITLE})")
    add("--notes", type=Path, metavar="FILE.md", help="the author's findings, in Markdown")
    add("--theory", type=Path, metavar="FOLDER", help="output of megapoly theory")
    add("--reference", metavar="NAME", help=f"activation to compare with ({REFERENCE})")
    add("--figures", nargs="+", metavar="NAME", help="draw these again, and write nothing else")
    return parser


def _report(options: argparse.Namespace) -> int:
    missing = [name for module, name in _PACKAGES.items() if not importlib.util.find_spec(module)]
    if missing:
        raise UnavailableError(
            f"A report needs {' and '.join(missing)}: `pip install '.[report]'`."
        )
    # Here and not above: --help and a wrong option answer without waiting for torch.
    from megapoly.study.figure_style import png
    from megapoly.study.report import content as contents
    from megapoly.study.report.answer import answers
    from megapoly.study.report.figures import chosen
    from megapoly.study.report.html import render

    content = _asked(contents.read(options.runs), options)
    pictures = options.output / "figures"
    if options.figures:
        for picture in chosen(content, options.figures):
            pictures.mkdir(parents=True, exist_ok=True)
            path = pictures / f"{picture.name}.png"
            path.write_bytes(png(picture.figure()))
            print(path)
        return 0
    pictures.mkdir(parents=True, exist_ok=True)
    contents.write(content, options.output / contents.FILE)
    # Read back: what is drawn again from the file is what is drawn here.
    content = contents.read([options.output / contents.FILE])
    page, files = render(content, recipes.FOLDER)
    for name, picture_bytes in files.items():
        (pictures / f"{name}.png").write_bytes(picture_bytes)
    path = options.output / "index.html"
    path.write_text(page, encoding="utf-8")
    print(answers(content))
    print(f"{path}: {len(page) / 1e6:.1f} MB, {len(files)} figures")
    return 0


def _asked(content: Content, options: argparse.Namespace) -> Content:
    """The content with what the command line says of it."""
    from megapoly.activations import registry

    complete = [run for run in content.runs if run.complete]
    if not complete:
        states = "; ".join(f"{r.name} at step {r.iteration} of {r.steps}" for r in content.runs)
        raise DataError(f"None of the runs is complete ({states}); let them finish.")
    changes: dict[str, Any] = {
        "title": options.title or content.title or TITLE,
        "reference": options.reference or content.reference or REFERENCE,
    }
    registry.get(changes["reference"])
    if options.notes:
        changes["notes"] = _text(options.notes)
    if options.theory:
        try:
            changes["theory"] = json.loads(_text(options.theory / "theory.json"))
        except ValueError as error:
            raise DataError(
                f"`{options.theory / 'theory.json'}` is not JSON ({error}); write it anew by "
                "`megapoly theory`."
            ) from error
        changes["theory_folder"] = str(_as_named(options.theory))
    return replace(content, **changes)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"`{path}` is no text in UTF-8 ({error}); save it as such.") from error


def _as_named(folder: Path) -> Path:
    """From the current folder where it lies below it, else as it is."""
    relative = os.path.relpath(folder)
    return folder if relative.startswith("..") else Path(relative)
