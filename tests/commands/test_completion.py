"""Completion scripts, in a real bash."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from megapoly.commands import COMMANDS
from megapoly.commands.completion import SHELLS, main
from megapoly.config.recipes import recipe_names

# A line to complete at its end, and what it must offer.
OFFERED = {
    "": [*COMMANDS],
    "check": ["check-parallel"],
    "train --config moe_": [name for name in recipe_names() if name.startswith("moe_")],
    "plan --config dense_t": ["dense_tiny"],
    "train --model.qk": ["--model.qk_norm"],
    "train --model.qk_norm ": ["none", "head", "full"],
    "train --training.bf16 ": ["true", "false"],
    "train --nproc": ["--nproc-per-node"],
    "plan --gpu h2": ["h200"],
    "plan --wor": ["--world-size"],
    "evaluate --parallel.exp": [
        "--parallel.expert_model_parallel_size",
        "--parallel.expert_tensor_parallel_size",
    ],
    "export --mod": ["--model"],
    "generate --model.": [],
    "benchmark ": ["operators", "training", "saving", "preprocess"],
    "benchmark operators --ord": ["--order"],
    "preprocess ": ["verify", "merge", "inspect", "stats"],
    "preprocess --inp": ["--input"],
    "preprocess stats --js": ["--json"],
    "launch --nproc-per": ["--nproc-per-node"],
    "completion ": [*SHELLS],
}
COMPLETE = """
source "$1"
shift
for line in "$@"; do
    read -ra COMP_WORDS <<< "$line"
    [[ $line == *" " ]] && COMP_WORDS+=("")
    COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
    _shtab_megapoly
    echo "${COMPREPLY[*]}"
done
"""


@pytest.fixture
def script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert main(["bash"]) == 0
    path = tmp_path / "megapoly.bash"
    path.write_text(capsys.readouterr().out)
    return path


def test_bash_completes_commands_options_recipes_and_values(script: Path) -> None:
    bash = shutil.which("bash")
    assert bash
    lines = [f"megapoly {line}" for line in OFFERED]
    result = subprocess.run(
        [bash, "-c", COMPLETE, "bash", str(script), *lines], capture_output=True, text=True
    )
    offered = [line.split() for line in result.stdout.splitlines()]
    assert dict(zip(OFFERED, offered, strict=True)) == OFFERED


def test_earlier_spellings_are_not_offered(script: Path) -> None:
    text = script.read_text()
    for earlier in ("--checkpoint ", "--world_sizes", "--timeout_s", "--processes"):
        assert earlier not in text


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_has_a_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([shell]) == 0
    text = capsys.readouterr().out
    assert "check-parallel" in text and "moe_7b_paper" in text


def test_another_shell_is_refused() -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["fish"])
    assert stopped.value.code == 2
