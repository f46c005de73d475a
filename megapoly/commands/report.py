"""Make a page of tables and figures that compares the activations of any set of runs.

    megapoly report runs/comparison --output report --notes findings.md
    megapoly report report/report.json --figures dense_training_loss --output report

Each RUN is the folder of a run, a folder that contains runs at any depth (such as the output of
megapoly compare), or the report.json of an earlier report. Several are merged; a later record of
the same run replaces an earlier one. The command writes to FOLDER:

index.html     the page, one file that opens without network
report.json    everything that the page shows; the page can be built from it again, byte for byte
figures/*.png  the figures; with --figures only these are written

Runs with different data, tokens, batch or size are in separate groups. Runs that have not finished
are listed and left out of the tables. See docs/reference/report.md.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megapoly.config import recipes
from megapoly.config.command_line import Parser, status_of
from megapoly.errors import DataError
from megapoly.platform import extras
from megapoly.platform.logs import show_errors_only

if TYPE_CHECKING:
    from megapoly.study.report.content import Content

REFERENCE = "swiglu"
TITLE = "Polynomial activations against fixed ones"


def main(argv: Sequence[str] | None = None) -> int:
    """Make the page; return 2 if something is missing or wrong."""
    options = build_parser().parse_args(argv)
    show_errors_only()
    return status_of(lambda: _report(options))


def build_parser() -> Parser:
    """Return the command's parser."""
    parser = Parser("report", __doc__)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="run, folder of runs or report.json")
    add("--output", required=True, type=Path, metavar="FOLDER", help="folder to write to")
    add("--title", help=f"heading of the page (default: {TITLE})")
    add(
        "--notes",
        type=Path,
        metavar="FILE.md",
        help="findings for the top of the page",
    )
    add(
        "--theory",
        type=Path,
        metavar="FOLDER",
        help="output of megapoly theory, to show it",
    )
    add(
        "--reference",
        metavar="NAME",
        help=f"activation to compare with (default: {REFERENCE})",
    )
    add("--figures", nargs="+", metavar="NAME", help="draw only these figures again")
    return parser


def _report(options: argparse.Namespace) -> int:
    extras.require("A report", "report", extras.EXTRAS["report"])
    # Imported here, so that --help and a wrong option do not wait for torch.
    from megapoly.study.figure_style import png
    from megapoly.study.report import content as contents
    from megapoly.study.report.answer import answers
    from megapoly.study.report.figures import chosen
    from megapoly.study.report.html import render

    content = _with_options(contents.read(options.runs), options)
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
    # Read it back, so that building from the file again gives the same page.
    content = contents.read([options.output / contents.FILE])
    page, files = render(content, recipes.FOLDER)
    for name, picture_bytes in files.items():
        (pictures / f"{name}.png").write_bytes(picture_bytes)
    path = options.output / "index.html"
    path.write_text(page, encoding="utf-8")
    print(answers(content))
    print(f"{path}: {len(page) / 1e6:.1f} MB, {len(files)} figures")
    return 0


def _with_options(content: Content, options: argparse.Namespace) -> Content:
    """Return the content with title, reference, notes and theory of the command line."""
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
                f"`{options.theory / 'theory.json'}` is not JSON ({error}); write it again with "
                "`megapoly theory`."
            ) from error
        changes["theory_folder"] = str(_as_named(options.theory))
    return replace(content, **changes)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"`{path}` is not UTF-8 text ({error}); save it as UTF-8.") from error


def _as_named(folder: Path) -> Path:
    """Return the folder relative to the current one if it is inside, else unchanged."""
    relative = os.path.relpath(folder)
    return folder if relative.startswith("..") else Path(relative)
