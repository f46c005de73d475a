"""``comparison.json``: the commands, the machine and the times of a comparison's trials."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import megapoly
from megapoly.platform.files import write_text
from megapoly.preflight.doctor.facts import system_facts
from megapoly.study.comparison.outcome import COMPARISON_FILE, read_comparison


@dataclass
class ComparisonRecord:
    """Content of ``comparison.json``: facts about a comparison that its runs do not contain.

    Args:
        path: of the file.
        commands: commands that were run in this folder, each once, the last one at the end.
        config: recipes of the trials.
        trials: ``wall_time_s`` and ``phase`` (``rates``: the grid of learning rates, ``seeds``) of
            each trial that was run, however it ended; ``diverged``: true if its loss was not
            finite.
        chosen: the first seed's run at each variant's learning rate, by the variant's name, for
            the variants that are done.
    """

    path: Path
    commands: list[str]
    config: list[str]
    trials: dict[str, dict[str, Any]] = field(default_factory=dict)
    chosen: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, output: Path, *, command: str, config: list[str]) -> ComparisonRecord:
        """Read the record of a folder, or start one, and add the command.

        Raises:
            DataError: the file is damaged, or was not written by this class.
        """
        written = read_comparison(output) or {"commands": [], "trials": {}, "chosen": {}}
        commands = [earlier for earlier in written["commands"] if earlier != command]
        return cls(
            path=output / COMPARISON_FILE,
            commands=[*commands, command],
            config=config,
            trials=written["trials"],
            chosen=written["chosen"],
        )

    def forget(self, run_dir: Path) -> None:
        """Drop the entry of a trial after its folder was deleted."""
        if not run_dir.exists():
            self.trials.pop(run_dir.name, None)

    def add(self, name: str, *, phase: str, seconds: float, diverged: bool = False) -> None:
        """Add the seconds of a trial to those before it was stopped and resumed."""
        before = self.trials.get(name, {}).get("wall_time_s", 0.0)
        self.trials[name] = {"phase": phase, "wall_time_s": before + seconds}
        if diverged:
            self.trials[name]["diverged"] = True

    def diverged(self, run_dir: Path) -> bool:
        """Return whether a run's loss was not finite; a deleted run starts again."""
        return run_dir.exists() and self.trials.get(run_dir.name, {}).get("diverged", False)

    def write(self) -> None:
        """Write the file atomically."""
        content = {
            "commands": self.commands,
            "config": self.config,
            "hardware": hardware(),
            "versions": versions(),
            "trials": self.trials,
            "chosen": self.chosen,
        }
        write_text(self.path, json.dumps(content, indent=1) + "\n")


def hardware() -> dict[str, Any]:
    """Return processor, cores, memory and GPU of this machine."""
    facts = system_facts()
    return {
        "cpu": _cpu_name(),
        "cores": facts.cores,
        "memory_gib": round(facts.memory_bytes / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def versions() -> dict[str, str]:
    """Return the versions of megapoly and of what it computes with."""
    return {
        "megapoly": megapoly.__version__,
        "torch": torch.__version__,
        "megatron-core": importlib.metadata.version("megatron-core"),
        "python": platform.python_version(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
