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
from tiny_jobs import TINY
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megapoly.config.recipes import FOLDER as RECIPES
from megapoly.errors import DivergenceError
from megapoly.model.builder import unwrap
from megapoly.pretrain import configure, pretrain
from megapoly.testing import run_on_ranks
from megapoly.testing.jobs import shared_cache
from megapoly.training import step

DENSE = TINY | {
    "training.train_iters": 6,
    "training.spike_window": 4,
    "checkpoint.keep": 0,
}
MOE = DENSE | {"model.num_moe_experts": 4, "model.moe_ffn_hidden_size": 24}
TENSOR = {"parallel.tensor_model_parallel_size": 2}
PIPELINE = {"parallel.pipeline_model_parallel_size": 2}
EXPERT = {"parallel.expert_model_parallel_size": 2}
CONTEXT = {"parallel.context_parallel_size": 2}
CHUNKS = PIPELINE | {
    "model.num_layers": 4,
    "parallel.virtual_pipeline_model_parallel_size": 2,
}
OVERLAP = {
    "parallel.use_distributed_optimizer": True,
    "parallel.overlap_grad_reduce": True,
    "parallel.overlap_param_gather": True,
}
BF16 = {"training.bf16": True}
# Name: recipe, options. Each has two processes.
LAYOUTS = {
    "tp2": ("dense_tiny", DENSE | TENSOR | {"training.global_batch_size": 2}),
    "dp2-overlap": ("dense_tiny", DENSE | OVERLAP),
    "pp2": ("dense_tiny", DENSE | PIPELINE),
    "pp2-bf16-tied": (
        "dense_tiny",
        DENSE | PIPELINE | BF16 | {"model.untie_embeddings_and_output_weights": False},
    ),
    "vpp2": ("dense_tiny", DENSE | CHUNKS),
    "cp2-per-token": ("dense_tiny", DENSE | CONTEXT | {"data.eod_mask_loss": True}),
    "ep2-bf16-overlap": ("moe_tiny", MOE | EXPERT | BF16 | OVERLAP),
    "tp2-ep2": ("moe_tiny", MOE | TENSOR | EXPERT | {"parallel.expert_tensor_parallel_size": 1}),
    "tp2-etp2": ("moe_tiny", MOE | TENSOR | {"model.activation_coefficients": "per_expert"}),
}
SKIP = {"training.spike_action": "skip", "training.spike_max_skips": 2}


@dataclass(frozen=True)
class Fault:
    """What happens at some steps.

    Args:
        kind: ``loss``: the loss of every micro-batch is multiplied by ``factor`` on a rank, as by
            a device that fails; ``module``: so is the output of a module for its second
            micro-batch, as by samples; ``gradient``: so is the last weight's reduced gradient;
            ``left out``: the optimizer does not update anything.
        steps: at which it happens.
        factor: of the loss or output.
        rank: where it happens; None: everywhere.
        module: its name in the rank's part of the model.
    """

    kind: str
    steps: tuple[int, ...]
    factor: float = math.nan
    rank: int | None = None
    module: str = ""


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
    {
        "loss": _spoil_losses,
        "module": _spoil_module,
        "gradient": _spoil_gradient,
        "left out": _leave_out,
    }[fault.kind](fault)


def _spoil_losses(fault: Fault) -> None:
    compute, mean, current = step.compute_gradients, step.masked_mean, [0]

    @functools.wraps(compute)
    def noting_step(state, batches):
        current[0] = state.iteration + 1
        try:
            return compute(state, batches)
        finally:
            current[0] = 0  # what is computed again has no fault

    def faulty_mean(divisor, mask, losses):
        here = fault.rank in (None, torch.distributed.get_rank())
        if current[0] in fault.steps and here:
            losses = losses * fault.factor
        return mean(divisor, mask, losses)

    step.compute_gradients, step.masked_mean = noting_step, faulty_mean


def _spoil_module(fault: Fault) -> None:
    compute, calls = step.compute_gradients, [0]

    @functools.wraps(compute)
    def hooking(state, batches):
        if calls[0] == 0 and fault.rank in (None, torch.distributed.get_rank()):
            module = unwrap(state.chunks[0]).get_submodule(fault.module)
            module.register_forward_hook(lambda module, inputs, outputs: spoilt(state, outputs))
        return compute(state, batches)

    def spoilt(state, outputs):
        is_second = calls[0] % state.layout.num_microbatches == 1
        calls[0] += 1
        if state.iteration + 1 not in fault.steps or not is_second:
            return outputs
        return (outputs[0] * fault.factor, *outputs[1:])

    step.compute_gradients = hooking


def _spoil_gradient(fault: Fault) -> None:
    compute = step.compute_gradients

    def spoiling(state, batches):
        losses = compute(state, batches)
        here = fault.rank in (None, torch.distributed.get_rank())
        if state.iteration + 1 in fault.steps and here:
            list(state.chunks[-1].parameters())[-1].main_grad.mul_(fault.factor)
        return losses

    step.compute_gradients = spoiling


def _leave_out(fault: Fault) -> None:
    update, inner, count = step.apply_gradients, ChainedOptimizer.step_with_ready_grads, [0]

    def counting(optimizer, norm):
        count[0] += 1
        update(optimizer, norm)

    step.apply_gradients = counting
    ChainedOptimizer.step_with_ready_grads = lambda optimizer: (
        count[0] in fault.steps or inner(optimizer)
    )


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
