"""Stand-ins for a cluster's programs, on the PATH in tests; they record how they are called."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
# A job of some seconds, on one process or two.
TINY = """
    --model.num_layers 2 --model.hidden_size 64 --model.activation_backend reference
    --training.seq_length 32 --training.micro_batch_size 1 --training.global_batch_size 2
    --optimizer.lr_warmup_iters 2 --optimizer.lr_decay_iters 400 --training.eval_interval 0
    --logging.tensorboard false
""".split()


class Programs:
    """Programs in a folder, each a few lines of Python that see their arguments as ``args``.

    Args:
        folder: of the programs and their records.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.path = folder / "bin"
        self.path.mkdir()

    def add(self, name: str, body: str = "") -> None:
        """Write a program that records its arguments and then runs ``body``."""
        program = self.path / name
        program.write_text(
            f"#!{sys.executable}\n"
            "import json, os, pathlib, signal, subprocess, sys, time\n"
            f"folder, args = pathlib.Path({str(self.folder)!r}), sys.argv[1:]\n"
            f"with (folder / '{name}.jsonl').open('a') as notes:\n"
            "    print(json.dumps(args), file=notes, flush=True)\n" + body
        )
        program.chmod(0o755)

    def calls(self, name: str) -> list[list[str]]:
        """Return the arguments of every call so far."""
        notes = self.folder / f"{name}.jsonl"
        return (
            [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []
        )

    def start(
        self, args: list[str], variables: Mapping[str, str] | None = None, cwd: Path = ROOT
    ) -> subprocess.Popen[str]:
        """Start a command that finds these programs first, without the settings of this machine."""
        foreign = ("SLURM", "PET_", "NCCL_", "TORCH_", "UCX_", "NVTE_", "GLOO_", "OMP_", "HF_")
        foreign += ("PYTORCH_", "MEGAPOLY_", "CUDA_", "FI_", "OTEL_", "TRITON_", "TORCHINDUCTOR_")
        foreign += ("http_", "https_", "no_proxy", "HTTP_", "HTTPS_", "NO_PROXY", "ENGINE")
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
        scripts = str(Path(sys.executable).parent)  # megapoly-launch
        path = os.pathsep.join([str(self.path), scripts, os.environ["PATH"]])
        return subprocess.Popen(
            args,
            cwd=cwd,
            env=inherited | {"PATH": path} | dict(variables or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(
        self, args: list[str], variables: Mapping[str, str] | None = None, cwd: Path = ROOT
    ) -> tuple[int, str]:
        """Return the status and output of a command; see :meth:`start`."""
        process = self.start(args, variables, cwd)
        output, _ = process.communicate()
        return process.returncode, output


def steps(run_dir: Path) -> list[int]:
    """Return the number of steps in the run's log."""
    log = run_dir / "metrics.jsonl"
    return (
        [json.loads(line)["iteration"] for line in log.read_text().splitlines()]
        if log.exists()
        else []
    )
