from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import Programs


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[Programs]:
    """Programs on the PATH of the commands that a test starts, which all end with the test."""
    programs = Programs(tmp_path)
    yield programs
    programs.stop()
