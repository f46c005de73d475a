"""Jobs with a fault at one step: a loss that is not finite or too large, or a step left out."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.optimizer import ChainedOptimizer
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megapoly.config.recipes import FOLDER as RECIPES
from megapoly.errors import DivergenceError
from megapoly.pretrain import configure, pretrain
from megapoly.testing import run_on_ranks
from megapoly.testing.jobs import shared_cache
from megapoly.training import step

TINY = {
    "model.num_layers": 2,
    "model.hidden_size": 16,
    "model.num_attention_heads": 2,
    "model.activation_backend": "reference",
    "training.seq_length": 16,
    "training.micro_batch_size": 1,
    "training.global_batch_size": 4,
    "training.train_iters": 8,
    "training.eval_interval": 0,
    "training.spike_window": 4,
    "optimizer.lr_warmup_iters": 2,
    "checkpoint.keep": 0,
    "logging.tensorboard": False,
    "training.device": "cpu",
}
DENSE = TINY | {"model.ffn_hidden_size": 24}
MOE = TINY | {"model.num_moe_experts": 4, "model.moe_ffn_hidden_size": 24}
SKIP = {"training.spike_action": "skip", "training.spike_max_skips": 2}


@dataclass(frozen=True)
class Fault:
    """What happens at some steps.

    Args:
        kind: ``loss``: the loss of every micro-batch is multiplied by ``factor`` on a rank;
            ``left out``: the optimizer does not update anything.
        steps: at which it happens.
        factor: of the loss.
        rank: where it happens; None: everywhere.
    """

    kind: str
    steps: tuple[int, ...]
    factor: float = math.nan
    rank: int | None = None


@dataclass
class Job:
    """A job that has ended.

    Args:
        printed: lines of rank 0.
        metrics: of each step.
        error: text of the DivergenceError that ended it on each rank; empty: none did.
    """

    printed: list[str]
    metrics: list[dict]
    errors: list[str]

    @property
    def unusual(self):
        """Lines about unusual steps."""
        return [line for line in self.printed if line.startswith("step ") and ": " in line]


def train(run_dir: Path, options, *faults, recipe="dense_tiny", num_ranks=1) -> Job:
    """Run a job until it ends, by itself or by a DivergenceError."""
    fixed = {"run_dir": run_dir, "data.cache_dir": shared_cache().name}
    argv = [f"--{name}={value}" for name, value in (options | fixed).items()]
    outputs = run_on_ranks(_job, num_ranks, argv, str(RECIPES / f"{recipe}.yaml"), faults)
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line, parse_constant=_refuse) for line in lines]
    return Job(outputs[0][0].splitlines(), metrics, [error for _, error in outputs])


def _refuse(constant):
    raise ValueError(f"{constant} is not JSON")


def _job(argv, recipe, faults):
    printed, error = io.StringIO(), ""
    for fault in faults:
        _install(fault)
    with contextlib.redirect_stdout(printed):
        try:
            config = configure(argv, default_recipe=Path(recipe), program="pretrain")
            pretrain(config)
        except DivergenceError as divergence:
            error = str(divergence)
    return printed.getvalue(), error


def _install(fault: Fault) -> None:
    """Patch the step in this process, which ends with the job."""
    current = [0]
    compute, mean, update = step.compute_gradients, step.masked_mean, step.apply_gradients

    @functools.wraps(compute)
    def noting_step(state, batches):
        current[0] = state.iteration + 1
        try:
            return compute(state, batches)
        finally:
            current[0] = 0  # what is computed again has no fault

    def faulty_mean(divisor, mask, losses):
        here = fault.rank in (None, torch.distributed.get_rank())
        if fault.kind == "loss" and current[0] in fault.steps and here:
            losses = losses * fault.factor
        return mean(divisor, mask, losses)

    step.compute_gradients, step.masked_mean = noting_step, faulty_mean
    if fault.kind == "left out":
        inner = ChainedOptimizer.step_with_ready_grads

        def leaving_out(optimizer):
            return iteration[0] in fault.steps or inner(optimizer)

        iteration = [0]

        def noting_update(optimizer, norm):
            iteration[0] += 1
            update(optimizer, norm)

        step.apply_gradients = noting_update
        ChainedOptimizer.step_with_ready_grads = leaving_out


def checkpoint(run_dir: Path, iteration: int) -> Path:
    """Return the path of a checkpoint."""
    return run_dir / "checkpoints" / f"iter_{iteration:07d}"


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint: weights, moments, master weights."""
    reader = FileSystemReader(path)
    entries = reader.read_metadata().state_dict_metadata
    found = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(found, storage_reader=reader, no_dist=True)
    return found


def assert_same_tensors(path: Path, other: Path) -> None:
    """Check that two checkpoints have the same tensors to the bit."""
    found, expected = tensors(path), tensors(other)
    assert found.keys() == expected.keys() and found
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name
