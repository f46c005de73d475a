"""The floors in pyproject.toml: an import of a package above is found and named."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from sources import ROOT

# At the top, in a function, for types alone; and one that the operators must do without.
ARROWS = {
    "config/schema.py": "import megapoly.training.loop",
    "data/blend.py": "def late():\n    from megapoly.evaluation import perplexity",
    "model/norms.py": "if typing.TYPE_CHECKING:\n    from megapoly.study import report",
    "ops/polynorm.py": "import megatron.core",
}


def lint_imports(folder: Path) -> str:
    command = [Path(sys.executable).with_name("lint-imports"), "--no-logo", "--no-cache"]
    environment = {"PYTHONPATH": str(folder)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    return done.stdout


def test_an_arrow_up_is_found_and_named(tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__", "builtin", "*.yaml")
    shutil.copytree(ROOT / "megapoly", tmp_path / "megapoly", ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "megapoly/cellar.py").write_text('"""A module that has no floor."""\n')
    for path, line in ARROWS.items():
        with (tmp_path / "megapoly" / path).open("a") as file:
            file.write(f"\n{line}\n")
    output = lint_imports(tmp_path)
    for broken in (
        "megapoly.config is not allowed to import megapoly.training:",
        "megapoly.config.schema -> megapoly.training.loop",
        "megapoly.data is not allowed to import megapoly.evaluation:",
        "megapoly.model is not allowed to import megapoly.study:",
        "megapoly.ops is not allowed to import megatron:",
        "- megapoly.cellar",
    ):
        assert broken in output, output
