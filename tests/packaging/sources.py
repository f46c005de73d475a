"""The files of the checkout, the Makefile's variables, and setup.py without setuptools."""

from __future__ import annotations

import runpy
import shutil
import subprocess
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
needs_git = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
needs_make = pytest.mark.skipif(not shutil.which("make"), reason="there is no command `make`")


def source_files() -> list[str]:
    """Return the files of the checkout that git tracks or would."""
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return [path for path in listed.stdout.splitlines() if (ROOT / path).is_file()]


def copy_sources(folder: Path) -> None:
    """Copy these files, so that a build finds no leftovers of another and leaves none."""
    for path in source_files():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, target, follow_symlinks=False)


def setup_arguments() -> dict[str, Any]:
    """Return the arguments that setup.py passes to setuptools."""
    with mock.patch("setuptools.setup") as setup:
        runpy.run_path(str(ROOT / "setup.py"))
    return setup.call_args.kwargs


def requirements() -> dict[str, list[Requirement]]:
    """Return the requirements of every extra, those of extras that it includes among them.

    The key "" is what every installation has.
    """
    arguments = setup_arguments()
    extras = {"": arguments["install_requires"], **arguments["extras_require"]}

    def flat(extra: str) -> list[Requirement]:
        found = []
        for requirement in map(Requirement, extras[extra]):
            if requirement.name == "megapoly":
                found += [each for other in sorted(requirement.extras) for each in flat(other)]
            else:
                found.append(requirement)
        return found

    return {extra: flat(extra) for extra in extras}


def values_of_make(*names: str) -> dict[str, str]:
    """Return the values of variables of the Makefile."""
    shown = "shown:;@" + ";".join(f"echo '$({name})'" for name in names)
    make = ["make", "--no-print-directory", "-f", "Makefile", "-f", "-", "shown"]
    found = subprocess.run(make, cwd=ROOT, input=shown, check=True, capture_output=True, text=True)
    return dict(zip(names, found.stdout.splitlines(), strict=True))
