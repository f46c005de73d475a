"""Ranks that are built without other processes are those of a real job."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megapoly.config import Config, load_yaml
from megapoly.config.parsing import override
from megapoly.errors import ConfigError
from megapoly.platform.device import select_platform
from megapoly.platform.machine import CPU, Machine
from megapoly.preflight.planning.planned_config import planned_config
from megapoly.testing import run_on_ranks

ROOT = Path(__file__).parents[3]
RECIPES = ROOT / "examples" / "configs"
A100 = Machine(cuda=True, compute_capability=(8, 0))
TOKENS, HIDDEN, FFN, HEADS, SEQ = 2 * 32, 64, 96, 4, 32
SMALL = [
    *("--model.num_layers", "2", "--model.hidden_size", "64", "--model.ffn_hidden_size", "96"),
    *("--training.seq_length", "32", "--training.bf16", "true"),
    *("--training.micro_batch_size", "2", "--training.global_batch_size", "64"),
    *("--training.train_iters", "1", "--training.device", "cpu"),
]
EXPERTS = [
    *("--model.num_moe_experts", "4", "--model.moe_router_topk", "2"),
    *("--model.moe_ffn_hidden_size", "96", "--model.qk_norm", "full"),
]
DISTRIBUTED = ["--parallel.use_distributed_optimizer", "true"]
TP2, PP2, EP2 = (
    [f"--parallel.{form}_model_parallel_size", "2"] for form in ("tensor", "pipeline", "expert")
)


def small(*words):
    config = Config()
    override(config, [*SMALL, *words])
    return config


def recipe(name, *words):
    config = load_yaml(RECIPES / f"{name}.yaml")
    override(config, words)
    return config


def dry_runs(cases, machine, every_rank=False):
    """One after another in one process, which is as before after them."""
    select_platform("cpu")
    from megapoly.preflight.planning.dry_run import dry_run

    before = torch.cuda.current_device(), "masked_select" in vars(torch.Tensor)
    found = [dry_run(config, size, machine, every_rank=every_rank) for config, size in cases]
    assert not dist.is_initialized()
    assert before == (torch.cuda.current_device(), "masked_select" in vars(torch.Tensor))
    return found


def run(*cases, machine=A100, every_rank=False):
    return run_on_ranks(dry_runs, 1, cases, machine, every_rank)[0]


def test_paper_models_add_up_to_the_digit():
    dense, moe, large = run(
        (recipe("dense_1b_paper"), 32),
        (recipe("moe_7b_paper"), 64),
        (recipe("moe_7b_paper", "--training.global_batch_size", "8192"), 4096),
    )
    assert dense.problems == moe.problems == large.problems == ()
    assert dense.total_parameters == dense.counted_parameters == 1_345_423_456
    for found in (moe, large):
        assert found.total_parameters == found.counted_parameters == 6_919_161_920
        assert found.active_parameters == 1_282_017_344
    (each,) = moe.classes
    assert (each.num_ranks, moe.num_built) == (64, 8)
    # Two matrices for each of 8 experts in 16 layers; everything else on every rank.
    assert each.expert_parameters == 16 * 8 * 2 * 2048 * 1536
    assert each.dense_parameters == 6_919_161_920 - 8 * each.expert_parameters
    # bf16, fp32, and 12 bytes of Adam over 64 ranks (experts: 8); padding adds little.
    assert each.weight_bytes == pytest.approx(2 * each.parameters, rel=1e-5)
    assert each.gradient_bytes == pytest.approx(4 * each.parameters, rel=1e-5)
    shard = each.dense_parameters / 64 + each.expert_parameters / 8
    assert each.optimizer_bytes == pytest.approx(12 * shard, rel=1e-4)


def real_bytes(config):
    """Parameters of this rank, and bytes of weights, gradients and optimizer after a step."""
    platform = select_platform("cpu")
    from megapoly.model.builder import build_model
    from megapoly.training.distributed import process_groups
    from megapoly.training.optimizer import build_optimizer

    with process_groups(config, platform):
        chunks = build_model(config, platform)
        optimizer = build_optimizer(config, chunks)
        for chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.step()
        parameters = [p for chunk in chunks for p in chunk.parameters()]
        weights = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in parameters}
        buffers = [b for c in chunks for b in (*c.buffers, *c.expert_parallel_buffers)]
        state = [
            tensor
            for part in optimizer.chained_optimizers
            for p, moments in part.optimizer.state.items()
            for tensor in (p, *moments.values())
        ]
        return (
            sum(p.numel() for p in parameters),
            sum(storage.nbytes() for storage in weights.values()),
            sum(b.grad_data.numel() * 4 for b in buffers),
            sum(t.numel() * t.element_size() for t in state),
        )


def test_ranks_are_those_of_a_real_job():
    configs = [
        planned_config(small(*words), 4, CPU)
        for words in (
            [*TP2, *PP2],
            [*PP2, *DISTRIBUTED],
            [*EXPERTS, *EP2, *TP2, *DISTRIBUTED, "--parallel.expert_tensor_parallel_size", "1"],
        )
    ]
    planned = run(*((config, 4) for config in configs), machine=CPU, every_rank=True)
    for config, found in zip(configs, planned, strict=True):
        assert found.problems == ()
        for rank, real in enumerate(run_on_ranks(real_bytes, 4, config)):
            each = found.classes[found.class_of_rank[rank]]
            assert real == (
                each.parameters,
                each.weight_bytes,
                each.gradient_bytes,
                found.optimizer_bytes_of_rank[rank],
            )
    assert len(planned[0].classes) == 2  # the stages
    assert len({*planned[1].optimizer_bytes_of_rank}) > 1  # shards with and without padding


def test_distinct_ranks_stand_for_all():
    words = [*EXPERTS, *TP2, *PP2, *EP2, *DISTRIBUTED, "--parallel.expert_tensor_parallel_size=1"]
    words += ["--model.activation", "gated_polynorm", "--parallel.context_parallel_size", "2"]
    words += ["--model.activation_coefficients", "per_expert"]
    config = small(*words, "--model.untie_embeddings_and_output_weights", "false")
    every, distinct = run((config, 16), every_rank=True)[0], run((config, 16))[0]
    assert (every.num_built, distinct.num_built) == (16, 4)
    assert every.problems == distinct.problems == ()
    assert every.classes == distinct.classes
    assert every.optimizer_bytes_of_rank == distinct.optimizer_bytes_of_rank


def test_activations_are_those_of_the_tensors_that_a_layer_keeps():
    full = ["--parallel.recompute_granularity", "full", "--parallel.recompute_method", "uniform"]
    full += ["--parallel.recompute_num_layers", "1"]
    four = ["--model.num_layers", "4"]
    experts = [*EXPERTS, *four]
    configs = [small(), small(*four), small(*full), small(*full, *four), small(*four, *PP2)]
    configs += [small(*experts), small(*experts, "--model.moe_router_topk", "4")]
    found = run(*((config, 4) for config in configs))
    kept = [each.classes[0].activation_bytes for each in found]
    # bf16: two norms, q k v, q and k rotated, attention, two sums; FFN before and after activation.
    layer = TOKENS * 2 * (10 * HIDDEN + 2 * FFN)
    # fp32: a number of each norm, log-sum-exp of each head, three roots of PolyNorm; rotations.
    layer += TOKENS * 4 * (2 + HEADS + 3) + 4 * SEQ * (HIDDEN // HEADS) * 2
    layer += 3 * 8  # state of attention's random numbers
    assert kept[1] - kept[0] == 2 * layer
    assert kept[3] - kept[2] == 2 * TOKENS * HIDDEN * 2  # a layer's input
    first, last = found[4].classes
    assert first.activation_bytes == 2 * first.activation_bytes_of_pass[0]  # of 2 stages
    assert last.activation_bytes == last.activation_bytes_of_pass[0]
    # Two more experts a token: rows before FC1, before and after activation; their indices.
    rows = 4 * TOKENS * 2 * (2 * (HIDDEN + 2 * FFN))
    assert kept[6] - kept[5] == pytest.approx(rows, rel=0.08)


def test_weights_that_do_not_add_up_are_named():
    from megapoly.preflight.planning.built_rank import BuiltRank, ShardPlace
    from megapoly.preflight.planning.dry_run import _parts_that_do_not_add_up

    parts = {ShardPlace("a", (0,)): 10, ShardPlace("b", (1,)): 5}
    rank = BuiltRank(1, 0, 2, 4, 8, None, None, 8, parts, {})
    assert _parts_that_do_not_add_up([rank], {"a": 10, "b": 5}) == []
    (size,) = _parts_that_do_not_add_up([rank], {"a": 10, "b": 11})
    assert "`b` has 11 numbers in the whole model, and ranks hold 5" in size
    twice = _parts_that_do_not_add_up([rank, rank], {"a": 20, "b": 10})
    assert [text.split(";")[0] for text in twice] == [
        "`a` at (0,) is saved by 2 ranks",
        "`b` at (1,) is saved by 2 ranks",
    ]


def test_rules_hold_for_the_planned_job_and_files_may_be_elsewhere():
    planned_config(recipe("moe_7b_paper"), 64, A100)
    with pytest.raises(ConfigError, match=r"number of processes \(12\)"):
        planned_config(recipe("moe_7b_paper"), 12, A100)
    with pytest.raises(ConfigError, match=r"set `--model\.vocab_size`"):
        planned_config(recipe("moe_7b_paper", "--model.vocab_size", "null"), 64, A100)
    from megapoly.preflight.planning.dry_run import dry_run

    with pytest.raises(ConfigError, match="cannot be imported here"):
        dry_run(recipe("moe_7b_paper", "--model.transformer_engine", "true"), 64, A100)


def test_fp8_is_refused_as_on_the_machine_and_changes_no_weight():
    from megapoly.preflight.planning.dry_run import dry_run

    words = ["--training.device", "auto", "--training.fp8", "hybrid"]
    with pytest.raises(ConfigError, match=r"8\.9 or above, and this GPU has 8\.0"):
        dry_run(small(*words), 1, A100)
    h100 = Machine(cuda=True, compute_capability=(9, 0))
    fp8, bf16 = run((small(*words), 1), (small(), 1), machine=h100)
    assert fp8.total_parameters == bf16.total_parameters > 0
    assert fp8.problems == ()


def test_script_shows_the_ranks_once(tmp_path):
    command = ["bash", str(ROOT / "examples" / "pretrain_dense.sh"), "--dry_run", "--gpu=h200"]
    command += ["--world-size", "4", "--run_dir", str(tmp_path / "run"), *PP2]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "NPROC_PER_NODE": "2"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("parameters: 5,310,736") == 1
    assert "built 2 of 4 ranks" in done.stdout and "all adds up" in done.stdout
    assert done.stderr == ""
    assert not (tmp_path / "run").exists()
