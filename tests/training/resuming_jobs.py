"""Jobs that resume: with what they print, and the samples that they train on."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import tiny_jobs
import torch

from megapoly.config.recipes import FOLDER as RECIPES
from megapoly.pretrain import configure, pretrain
from megapoly.testing import run_on_ranks
from megapoly.testing.jobs import shared_cache
from megapoly.training import loop, step

TINY = tiny_jobs.TINY | {
    "model.num_layers": 1,
    "optimizer.lr": 0.5,
    "optimizer.min_lr": 0.05,
    "optimizer.clip_grad": 1e-9,  # only the learning rates matter
    "checkpoint.keep": 0,
}


class Job:
    """A finished job.

    Args:
        run_dir: its folder.
        outputs: what each rank printed, and the samples of each of its micro-batches.
    """

    def __init__(self, run_dir, outputs):
        self.printed = outputs[0][0].splitlines()
        self.samples = [samples for _, samples in outputs]
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
        self.metrics = [json.loads(line) for line in lines]

    def column(self, name):
        """Return a metric of all steps."""
        return [line[name] for line in self.metrics]


def train(run_dir, options, *, num_ranks=1):
    """Run a job of ``dense_tiny``, made smaller, to its end."""
    return Job(run_dir, run_on_ranks(_job, num_ranks, _arguments(run_dir, options)))


def optimizer_groups(run_dir, options):
    """Return the parameter groups of the optimizer, without parameters, when a job has resumed."""
    return run_on_ranks(_groups, 1, _arguments(run_dir, options))[0]


def _arguments(run_dir, options):
    fixed = {"run_dir": run_dir, "data.cache_dir": shared_cache().name}
    return [f"--{name}={value}" for name, value in (TINY | fixed | options).items()]


def checkpoint(run_dir: Path, iteration: int) -> Path:
    """Return the path of a checkpoint."""
    return run_dir / "checkpoints" / f"iter_{iteration:07d}"


def _job(argv):
    samples, printed = [], io.StringIO()
    original = step.get_batch_on_this_cp_rank

    def noting(batch):
        samples.extend(batch["tokens"].tolist())
        return original(batch)

    step.get_batch_on_this_cp_rank = noting  # in this process alone, which ends with the job
    with contextlib.redirect_stdout(printed):
        _pretrain(argv)
    return printed.getvalue(), torch.tensor(samples)


def _groups(argv):
    groups = []

    def noting(state, *args):
        for group in state.optimizer.param_groups:
            groups.append({name: value for name, value in group.items() if name != "params"})

    loop.train = noting
    _pretrain(argv)
    return groups


def _pretrain(argv):
    pretrain(configure(argv, default_recipe=RECIPES / "dense_tiny.yaml", program="pretrain"))
