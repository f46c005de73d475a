"""The files of tools/ are commands of ``megapoly`` under the paths that users know."""

from __future__ import annotations

import subprocess
import sys

import pytest
from sources import ROOT

COMMANDS = {
    "analyze": "analyze",
    "benchmark_ops": "benchmark operators",
    "benchmark_preprocess": "benchmark preprocess",
    "benchmark_training": "benchmark training",
    "check_parallel": "check-parallel",
    "compare_activations": "compare",
    "convert_from_hf": "import",
    "convert_to_hf": "export",
    "doctor": "doctor",
    "evaluate": "evaluate",
    "export_benchmarks": "export-benchmarks",
    "generate": "generate",
    "plan": "plan",
    "prepare_domains": "prepare-domains",
    "preprocess_data": "preprocess",
    "report": "report",
}
# All in one process, each as `python tools/NAME.py --help` runs it.
SHOW_HELP = """
import runpy, sys
for name in sys.argv[1:]:
    sys.argv = [f"tools/{name}.py", "--help"]
    sys.path.insert(0, "tools")
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        print(f"\\nEND {name} {end.code or 0}")
    while "tools" in sys.path:
        sys.path.remove("tools")
"""


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    command = [sys.executable, "-c", SHOW_HELP, *COMMANDS]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    parts = done.stdout.split("\nEND ")
    outcomes = [part.split("\n", 1)[0] for part in parts[1:]]
    assert outcomes == [f"{name} 0" for name in COMMANDS], done.stderr
    texts = [parts[0], *(part.split("\n", 1)[1] for part in parts[1:-1])]
    return dict(zip(COMMANDS, texts, strict=True))


def test_every_tool_is_listed() -> None:
    tools = {path.stem for path in (ROOT / "tools").glob("*.py")}
    assert tools == {*COMMANDS, "make_builtin_text"}  # a program of its own, for the repository


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_the_commands(name: str, helps: dict[str, str]) -> None:
    assert helps[name].lstrip().startswith(f"usage: megapoly {COMMANDS[name]} ")
