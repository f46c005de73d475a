"""README's first command in a fresh checkout: what it installs suffices, and no more is there."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from sources import copy_sources, needs_git, needs_make


@pytest.mark.slow
@pytest.mark.timeout(1800)
@needs_git
@needs_make
def test_make_pretrain_in_a_fresh_checkout(tmp_path: Path) -> None:
    copy_sources(tmp_path)
    leading = ("PYTHON", "MAKE", "VIRTUAL_ENV")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(leading)}
    done = subprocess.run(
        ["make", "pretrain"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "It was the best of" in done.stdout
    lines = (tmp_path / "runs/moe_tiny/metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["lm_loss"] for line in lines]
    assert len(losses) == 240 and losses[-1] < losses[0] - 2
    installed = [tmp_path / ".venv/bin/pip", "list", "--format=json"]
    listed = subprocess.run(installed, check=True, capture_output=True, text=True).stdout
    names = {package["name"].lower() for package in json.loads(listed)}
    assert {"megapoly", "megatron-core", "transformers"} <= names
    # Of the other extras.
    assert names.isdisjoint({"lm_eval", "datasets", "matplotlib", "mkdocs", "mypy", "pytest"})
