"""docs/how-to/on_call.md: each message that it explains is one that the program can print.

A message is in code style in the first column of a table that begins with `message`; `..` stands
for what the program fills in.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from documented import ROOT

from megapoly.platform import launcher

PAGE = (ROOT / "docs/how-to/on_call.md").read_text()
SCRIPTS = ["docker/launch.sh", *(str(p.relative_to(ROOT)) for p in ROOT.glob("examples/slurm/*"))]
FILLED_IN = "\0"


def rows(first_cell: str) -> Iterator[list[str]]:
    """The rows of all tables whose header begins with this cell."""
    for table in re.findall(r"(?:^\|.*\n)+", PAGE, re.MULTILINE):
        lines = [
            [cell.strip() for cell in line.strip().strip("|").split(" | ")]
            for line in table.splitlines()
        ]
        if lines[0][0].strip() == first_cell:
            yield from lines[2:]


def messages() -> list[str]:
    return [text for row in rows("message") for text in re.findall(r"`([^`]+)`", row[0])]


@functools.cache
def printed() -> list[str]:
    """Every text of the package's code, with a mark where values are filled in, and the scripts."""
    texts = [re.sub(r"\\\n", "", (ROOT / script).read_text()) for script in SCRIPTS]
    for path in Path(ROOT, "megapoly").rglob("*.py"):
        tree = ast.parse(path.read_text())
        docstrings = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and node.body
            and isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = (
                    str(part.value) if isinstance(part, ast.Constant) else FILLED_IN
                    for part in node.values
                )
                texts.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                if id(node) not in docstrings:
                    texts.append(re.sub(r"%[.\w]*[sdf]", FILLED_IN, node.value))
    return [text.replace("`", "") for text in texts]


def test_there_are_messages() -> None:
    assert len(messages()) > 20
    assert len(messages()) == len(set(messages()))


@pytest.mark.parametrize("message", messages())
def test_each_message_is_printed(message: str) -> None:
    pattern = ".*".join(re.escape(part) for part in message.split("..") if part)
    assert any(re.search(pattern, text, re.DOTALL) for text in printed()), message


def test_a_message_of_nobody_is_found() -> None:
    assert not any("the moon is in the way" in text for text in printed())


def test_the_statuses_are_those_of_the_program() -> None:
    table = {row[0].strip("`"): row for row in rows("status")}
    restarts = {status: row[2].startswith("yes") for status, row in table.items()}
    numbers = {int(text): restarts[text] for text in table if text.isdecimal()}
    assert numbers == {status: launcher.means_restart(status) for status in range(6)} | {137: True}
    assert "diverged" in table["3"][1] and launcher.DIVERGED == 3
    assert "hang" in table["4"][1] and launcher.HUNG == 4
    assert "lost" in table["5"][1] and launcher.LOST_PEER == 5
