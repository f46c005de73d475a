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
from megapoly.data.files import write_text
from megapoly.preflight.doctor.facts import system_facts
from megapoly.study.comparison.outcome import COMPARISON_FILE, read_comparison


@dataclass
class Record:
    """What a comparison knows beside its runs.

    Args:
        path: of the file.
        commands: that were given in this folder, each once, the last one at the end.
        config: recipes of the trials.
        trials: ``wall_time_s`` and ``phase`` (``rates``: the grid of learning rates, ``seeds``) of
            each that was run, however it ended; ``diverged``: true if its loss was not finite.
        chosen: run of the first seed at each variant's learning rate, by the variant's name; of
            those that are done.
    """

    path: Path
    commands: list[str]
    config: list[str]
    trials: dict[str, dict[str, Any]] = field(default_factory=dict)
    chosen: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, output: Path, *, command: str, config: list[str]) -> Record:
        """That of a folder, which goes on with what is written there.

        Raises:
            DataError: the file there is not one that this class has written.
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
        """Drop what is known of a trial whose folder was deleted."""
        if not run_dir.exists():
            self.trials.pop(run_dir.name, None)

    def add(self, name: str, *, phase: str, seconds: float, diverged: bool = False) -> None:
        """Count the seconds of a trial, which may have been stopped and gone on."""
        before = self.trials.get(name, {}).get("wall_time_s", 0.0)
        self.trials[name] = {"phase": phase, "wall_time_s": before + seconds}
        if diverged:
            self.trials[name]["diverged"] = True

    def diverged(self, run_dir: Path) -> bool:
        """Whether the loss of a run was not finite; one whose folder is deleted is run anew."""
        return run_dir.exists() and self.trials.get(run_dir.name, {}).get("diverged", False)

    def write(self) -> None:
        """Write the file, whole or not at all."""
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
    """Processor, cores, memory and GPU of this machine."""
    facts = system_facts()
    return {
        "cpu": _cpu_name(),
        "cores": facts.cores,
        "memory_gib": round(facts.memory_bytes / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def versions() -> dict[str, str]:
    """Of megapoly and what it computes with."""
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
