"""Layers of Transformer Engine: requested where it is missing, and built and trained on CPU.

Its Python code is the real one, from the wheel that the Makefile puts beside the environment; its
kernels are ``te_kernels.py``. With the real kernels: ``tests/gpu/test_gpu_transformer_engine.py``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from layouts import Result
from te_models import MODELS

from megapoly.config.fp8 import FP8_RECIPES
from megapoly.errors import ConfigError
from megapoly.platform.device import this_machine
from megapoly.pretrain import configure

RECIPE = Path(__file__).parents[2] / "examples" / "configs" / "moe_tiny.yaml"
JOB = Path(__file__).with_name("te_job.py")
WHEEL = Path(sys.prefix) / "transformer-engine"  # by the Makefile

not_installed = pytest.mark.skipif(
    this_machine().transformer_engine, reason="Transformer Engine is installed"
)


def problems_of(*args):
    with pytest.raises(ConfigError) as error:
        configure(
            ["--model.transformer_engine", "true", *args], default_recipe=RECIPE, program="test"
        )
    return error.value.problems


@not_installed
def test_on_cuda_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    (problem,) = problems_of("--training.device", "cuda")
    assert "`pip install 'megapoly[gpu]'`" in problem
    assert "`model.transformer_engine` (True)" in problem


@not_installed
def test_on_cpu_the_error_says_that_it_needs_cuda():
    (problem,) = problems_of("--training.device", "cpu")
    assert "needs `training.device` cuda, not cpu" in problem


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """Results of one process, and of each of two ranks; all three run at once."""
    assert WHEEL.is_dir(), f"`make test` installs what these tests need in {WHEEL}"
    output = tmp_path_factory.mktemp("te") / "result"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    job = subprocess.run(
        [sys.executable, "-W", "ignore", str(JOB), str(WHEEL), str(output)],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert job.returncode == 0, job.stderr[-4000:]
    files = [f"{output}{rank}" for rank in ("", 0, 1)]
    return [torch.load(file, weights_only=False) for file in files]


@pytest.fixture(scope="module")
def one_process(jobs):
    return jobs[0]


ENGINE = "megatron.core.extensions.transformer_engine"
NORM = "transformer_engine.pytorch.module.rmsnorm.RMSNorm"
ACTIVATION = "megapoly.model.ffn_activation.FFNActivation"
FUSED = f"{ENGINE}.TELayerNormColumnParallelLinear"
COLUMN, ROW = f"{ENGINE}.TEColumnParallelLinear", f"{ENGINE}.TERowParallelLinear"
IDENTITY = "megatron.core.transformer.identity_op.IdentityOp"
EVERY_LAYER = {
    "input_layernorm": IDENTITY,
    "self_attention.linear_qkv": FUSED,
    "self_attention.core_attention": f"{ENGINE}.TEDotProductAttention",
    "self_attention.linear_proj": ROW,
}
DENSE = {
    "pre_mlp_layernorm": IDENTITY,
    "mlp.linear_fc1": FUSED,
    "mlp.activation_func": ACTIVATION,
    "mlp.linear_fc2": ROW,
}
GROUPED = {
    "pre_mlp_layernorm": NORM,
    "mlp.experts": "megapoly.model.experts.GroupedExperts",
    "mlp.experts.linear_fc1": f"{ENGINE}.TEColumnParallelGroupedLinear",
    "mlp.experts.activation_func": ACTIVATION,
    "mlp.experts.linear_fc2": f"{ENGINE}.TERowParallelGroupedLinear",
}
LAYERS = {
    "dense": DENSE,
    "tied": DENSE,
    "gated": DENSE,
    "head norm": DENSE | {"self_attention.q_layernorm": NORM, "self_attention.k_layernorm": NORM},
    "experts": GROUPED,
    "fused permutation": GROUPED,
    "one after another": {
        "mlp.experts": "megapoly.model.experts.SequentialExperts",
        "mlp.experts.local_experts.3.linear_fc1": COLUMN,
        "mlp.experts.activation_func": ACTIVATION,
        "mlp.experts.local_experts.3.linear_fc2": ROW,
    },
    "coefficients of experts": GROUPED,
    "shared expert, full norm": GROUPED
    | {
        "mlp.shared_experts.linear_fc1": COLUMN,
        "mlp.shared_experts.activation_func": ACTIVATION,
        "mlp.shared_experts.linear_fc2": ROW,
        "self_attention.q_layernorm": "megapoly.model.norms.ProjectionRMSNorm",
        "self_attention.k_layernorm": "megapoly.model.norms.ProjectionRMSNorm",
    },
}


@pytest.mark.parametrize("name", MODELS)
def test_what_stands_in_each_slot(one_process, name):
    found, _ = one_process["models"][name]
    for slot, module in (EVERY_LAYER | LAYERS[name]).items():
        assert found.modules[f"decoder.layers.1.{slot}"] == module, slot
    assert found.modules["decoder.final_layernorm"] == NORM
    assert one_process["version"].startswith("2.11.")


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_has_the_same_tensors_as_that_of_local_layers(one_process, name):
    found, local = one_process["models"][name]
    assert found.shapes == local.shapes
    assert found.num_parameters == local.num_parameters


def test_marks_tell_whose_gradients_are_added_up(jobs):
    """In two ranks that share every matrix, and have half of the experts each."""
    marks = jobs[1]["tensor, expert"][1].marks
    layer = "decoder.layers."
    for name in (
        "self_attention.linear_qkv.layer_norm_weight",
        "pre_mlp_layernorm.weight",
        "mlp.experts.experts.activation_func.coefficients",
    ):
        assert marks[layer + name]["sequence_parallel"] is True, name
        assert not marks[layer + name]["tensor_model_parallel"]
    assert marks["decoder.final_layernorm.weight"]["sequence_parallel"] is True
    for name in ("linear_fc1", "linear_fc2"):
        experts = marks[f"{layer}mlp.experts.experts.{name}.weight"]
        assert experts["allreduce"] is False and experts["tensor_model_parallel"] is True
    for name in ("self_attention.linear_proj.weight", "self_attention.q_layernorm.weight"):
        assert marks[layer + name]["tensor_model_parallel"] is True
        assert marks[layer + name]["allreduce"] is not False


@pytest.mark.parametrize("name", [*MODELS, "fused gradients"])
def test_first_step_is_that_of_local_layers(one_process, name):
    apart = one_process["first steps"][name]
    assert apart["other weights"] == 0
    assert apart["losses"] < 1e-5
    assert apart["worst gradient"] < 2e-6
    assert apart["gradient norm"] < 1e-6


@pytest.mark.parametrize("layout", ["tensor", "tensor, expert", "expert tensor"])
def test_parallel_forms_are_those_of_one_process(jobs, layout):
    expected = jobs[0]["layouts"][layout]
    actual = Result([rank[layout][0] for rank in jobs[1:]])
    assert actual.weights.keys() == expected.weights.keys()
    for name, weight in expected.weights.items():
        assert torch.equal(actual.weights[name], weight), name
        gradient = expected.gradients[name]
        assert (actual.gradients[name] - gradient).norm() < 5e-6 * gradient.norm(), name
    norms = [rank.grad_norm for rank in (*actual.ranks, *expected.ranks)]
    assert norms == pytest.approx([norms[-1]] * 3, rel=1e-6)


@pytest.mark.parametrize("name", FP8_RECIPES)
def test_recipes_run_where_transformer_engine_lets_them(one_process, name):
    found = one_process["recipes"]
    cases = [case for case in found if case[0] == name]
    assert len(cases) == 21
    for _, capability, cuda in cases:
        major, minor = cuda.split(".")
        new_enough = (int(major), int(minor)) >= (FP8_RECIPES[name].cuda or (0, 0))
        runs = FP8_RECIPES[name].runs_on(capability) and new_enough
        assert found[name, capability, cuda] is runs, (capability, cuda)
    assert found[name] == FP8_RECIPES[name].multiple


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed"])
@pytest.mark.parametrize("name", ["dense", "experts", "one after another"])
def test_fp8_trains_as_bf16_does(one_process, name, recipe):
    bf16, fp8 = one_process["fp8"][name, recipe]
    assert fp8 != bf16
    assert fp8 == pytest.approx(bf16, abs=0.05)  # 0.03 apart
    assert bf16[0] - bf16[-1] > 0.4


def test_fp8_forms_of_experts_agree(one_process):
    fp8 = one_process["fp8"]
    assert fp8["experts", "tensorwise"][1] == fp8["one after another", "tensorwise"][1]


def test_only_products_see_fp8(one_process):
    """Activations, norms and experts hand over bf16, which Transformer Engine's layers cast."""
    assert one_process["quantized"] == {"torch.bfloat16"}


def test_rows_that_fill_up_an_expert_change_no_gradient(one_process):
    without, filled = one_process["padding"]
    assert without.keys() == filled.keys()
    for name, gradient in without.items():
        assert (filled[name] - gradient).norm() <= 1e-6 * gradient.norm(), name
    assert any(name.endswith("activation_func.coefficients") for name in without)


def test_recomputation_in_fp8_changes_nothing(one_process):
    losses = one_process["recomputed"]
    assert losses["layers"] == losses["experts"] == losses["nothing"]


def test_recomputation_in_fp8_repeats_no_sum_over_ranks(jobs):
    (losses, sums), (recomputed, sums_recomputed) = (
        jobs[1][f"recomputed {what}"] for what in ("nothing", "layers")
    )
    assert recomputed == losses
    # Two steps of two micro-batches, two layers, forward and backward.
    assert sums_recomputed == sums == 2 * 2 * 2 * 2


def test_checkpoints_go_from_one_family_of_layers_to_the_other_and_back(one_process):
    result = one_process["there and back"]
    assert result["same"] == [True, True]
    assert result["losses"] == pytest.approx(result["whole"], abs=1e-5)


def test_checkpoints_keep_the_history_of_delayed_scaling(one_process):
    result = one_process["history"]
    assert result["largest"] > 1 and len(result["same"]) == 8 and all(result["same"])
    whole, resumed = result["losses"]
    assert resumed == pytest.approx(whole, abs=1e-6)
