"""What ``from megapoly import ..`` offers: names, laziness, and types as mypy sees them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import megapoly

TESTS = Path(__file__).parent
USER = TESTS / "typed_user.py"


def test_every_name_can_be_imported():
    assert set(megapoly.__all__) <= set(dir(megapoly))
    for name in megapoly.__all__:
        assert getattr(megapoly, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'PolyNrom'"):
        megapoly.PolyNrom  # noqa: B018


IMPORT = "import sys, megapoly; print(megapoly.__version__, 'torch' in sys.modules)"


def test_import_is_light():
    result = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True)
    assert result.stdout.split() == [megapoly.__version__, "False"], result.stderr


def test_types_of_a_user_s_file():
    """Right lines pass, wrong ones do not. With mypy's cache it takes 1 s instead of 13 s."""
    command = [sys.executable, "-m", "mypy", "--config-file=", "--no-implicit-reexport", str(USER)]
    command += ["--cache-dir", str(TESTS.parent / ".mypy_cache" / "typed_user")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=TESTS.parent)
    assert not result.stderr, result.stderr
    found = re.findall(rf"{USER.name}:(\d+): error: .*\[([a-z-]+)\]$", result.stdout, re.MULTILINE)
    lines = enumerate(USER.read_text().splitlines(), start=1)
    expected = [(str(n), line.partition("# error: ")[2]) for n, line in lines if "# error" in line]
    assert len(expected) == 8
    assert found == expected, result.stdout
