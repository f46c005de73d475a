"""Commands in README and docs, as tests of several folders read them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
_FENCE = re.compile(r"^ *```(\w*)[^\n]*\n(.*?)^ *```", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    """Return the content of each fenced block of a language."""
    return [text for name, text in _FENCE.findall(page.read_text()) if name == language]


def command_lines(page: Path) -> list[str]:
    """Return the lines of a page's bash blocks, and of the blocks that README indents, joined."""
    texts = blocks(page, "bash")
    if page.name == "README.md":
        indented = re.findall(r"(?:^ {4}.*\n)+", _FENCE.sub("", page.read_text()), re.MULTILINE)
        texts += [text for text in indented if "PolyNorm(x) =" not in text]
    lines = "\n".join(texts).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]


def commands(page: Path) -> Iterator[list[str]]:
    """Return the arguments of each command line, comments left out, the program first."""
    for line in command_lines(page):
        for part in line.split(" && "):
            yield shlex.split(part, comments=True)


def arguments_of(page: str, *program: str) -> list[list[str]]:
    """Return what follows a program in each line of a page that starts with it."""
    found = commands(ROOT / page)
    return [each[len(program) :] for each in found if tuple(each[: len(program)]) == program]
