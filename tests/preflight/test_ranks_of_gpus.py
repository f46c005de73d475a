"""Ranks that work on a GPU meet torch and the engine as a job of torchrun does."""

from __future__ import annotations

import sys

import pytest
import torch

from megapoly.testing import jobs, run_job, run_on_ranks


def seen_by_a_rank():
    """Modules of the engine that were imported, and where functions come from that it changes."""
    engine = [name for name in sys.modules if name.startswith("megatron")]
    changed = (torch.cuda.current_device, torch.cuda.current_stream, torch.Tensor.type)
    return engine, {getattr(function, "__module__", "torch") for function in changed}


def test_the_engine_is_not_one_for_cpu_there():
    ((engine, changed),) = run_on_ranks(seen_by_a_rank, 1, device="cuda")
    assert engine == [] and changed == {"torch.cuda", "torch"}
    ((engine, changed),) = run_on_ranks(seen_by_a_rank, 1)
    assert engine != [] and "megapoly.platform.engine_workarounds" in changed


@pytest.mark.parametrize("overrides, device", [({}, "cpu"), ({"training.device": "cuda"}, "cuda")])
def test_a_job_has_ranks_of_its_device(overrides, device, tmp_path, monkeypatch):
    """Without a word of it that is the CPU, whose engine it is, also where there is a GPU."""
    called = []

    def run(function, num_ranks, words, recipe, *, device):
        called.append((device, f"--training.device={device}" in words))
        (tmp_path / "metrics.jsonl").write_text("{}\n")

    monkeypatch.setattr(jobs, "run_on_ranks", run)
    run_job("dense_tiny", tmp_path, overrides)
    assert called == [(device, True)]
