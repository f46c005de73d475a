from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import Programs


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[Programs]:
    """Give programs for the PATH of the commands that a test starts; all end with the test."""
    programs = Programs(tmp_path)
    yield programs
    programs.stop()
