from __future__ import annotations

from pathlib import Path

import pytest
from commands import Programs


@pytest.fixture
def programs(tmp_path: Path) -> Programs:
    """Give programs for the PATH of the commands that a test starts."""
    return Programs(tmp_path)
