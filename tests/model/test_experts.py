"""Idle experts, checkpoints of both forms of experts, activations that only the registry knows."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from layouts import EXPERTS, random_batches, small_config, whole_weights
from torch.testing import assert_close

from megapoly.activations import ACTIVATIONS, Activation, TensorParallelSum
from megapoly.model.builder import unwrap
from megapoly.platform.device import select_platform
from megapoly.testing import run_on_ranks
from megapoly.training.distributed import process_groups
from megapoly.training.load_checkpoint import load_checkpoint
from megapoly.training.save_checkpoint import CheckpointSaver
from megapoly.training.state import build_state
from megapoly.training.step import train_step

IDLE = 1


def gradients_with_idle_experts(options, idle=(IDLE,)):
    """Gradients by name after a batch in which the router sends nothing to some experts."""
    config = small_config(EXPERTS | options)
    platform = select_platform("cpu")
    with process_groups(config, platform):
        state = build_state(config, platform, corpus=None)
        for layer in unwrap(state.chunks[0]).decoder.layers:
            router = layer.mlp.router
            router.gating = lambda x, gating=router.gating: gating(x).index_fill(
                -1, torch.tensor(idle), -1e4
            )
        train_step(state, random_batches(config, state.layout))
        parameters = unwrap(state.chunks[0]).named_parameters()
        return {name: parameter.main_grad.clone() for name, parameter in parameters}


@pytest.mark.parametrize(
    ("activation", "grouped"),
    [
        *itertools.product(["polynorm", "gated_polynorm", "polyprelu", "swiglu"], [True]),
        *itertools.product(["gated_polynorm", "polyprelu"], [False]),
    ],
)
def test_idle_expert_has_gradients_of_exactly_zero(activation, grouped):
    options = {
        "model.activation": activation,
        "model.activation_coefficients": "per_expert",
        "model.moe_grouped_gemm": grouped,
    }
    if activation == "swiglu":
        options.pop("model.activation_coefficients")
    gradients = run_on_ranks(gradients_with_idle_experts, 1, options)[0]
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    for name, gradient in gradients.items():
        if ".experts.activation_func." in name:
            assert not gradient[IDLE].any() and gradient[[0, 2, 3]].any(dim=-1).all()
        elif ".experts." in name:
            is_idle = f"weight{IDLE}" in name or f"local_experts.{IDLE}." in name
            assert gradient.any() != is_idle, name


E, ET = (f"parallel.expert_{kind}_parallel_size" for kind in ("model", "tensor"))


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@pytest.mark.parametrize("coefficients", ["shared", "per_expert"])
@pytest.mark.parametrize("layout", [{E: 2}, {E: 2, ET: 2}], ids=["ep2", "ep2-etp2"])
def test_a_rank_whose_experts_are_all_idle(layout, coefficients, dispatcher):
    """Of 4 experts on 2 expert-parallel ranks, the second rank's get no token."""
    options = {
        "model.activation": "gated_polynorm",
        "model.activation_coefficients": coefficients,
        "model.moe_token_dispatcher_type": dispatcher,
        "training.global_batch_size": 4,
    }
    num_ranks = 2 * layout.get(ET, 1)
    ranks = run_on_ranks(gradients_with_idle_experts, num_ranks, options | layout, (2, 3))
    (expected,) = run_on_ranks(gradients_with_idle_experts, 1, options, (2, 3))
    for rank, gradients in enumerate(ranks):
        is_idle = rank >= num_ranks // 2
        for name, gradient in gradients.items():
            assert gradient.isfinite().all(), name
            if ".experts." not in name:
                assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7)
            elif coefficients == "shared" and ".activation_func." in name:
                # All ranks have the sum of all tokens.
                assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7)
            else:
                assert gradient.any() != is_idle, name


SEQUENTIAL = {"model.moe_grouped_gemm": False}


FORMS = {
    "grouped, then sequential": ({}, SEQUENTIAL, {"model.activation": "gated_polynorm"}),
    "sequential, then grouped": (SEQUENTIAL, {}, {"parallel.use_distributed_optimizer": True}),
}


def weights_after_two_steps(folder):
    """Of each run of one form, and of a run of the other form that resumes after its first step."""
    platform, result = select_platform("cpu"), {}
    corpus = SimpleNamespace(fingerprint="random", description={})
    with process_groups(small_config(EXPERTS), platform):
        for name, (before, after, options) in FORMS.items():
            options = EXPERTS | options | {"model.activation_coefficients": "per_expert"}
            states = []
            for form in (before, after):
                config = small_config(options | form | {"training.train_iters": 3})
                config.run_dir = str(folder / name)
                states.append(build_state(config, platform, corpus))
            whole, resumed = states
            train_step(whole, random_batches(whole.config, whole.layout))
            load_checkpoint(resumed, CheckpointSaver(whole).save(in_background=False))
            for state in states:
                train_step(state, random_batches(state.config, state.layout))
            result[name] = [whole_weights(state) for state in states]
    return result


def test_checkpoint_of_one_form_resumes_in_the_other(tmp_path):
    results = run_on_ranks(weights_after_two_steps, 1, tmp_path)[0]
    assert results.keys() == FORMS.keys()
    for whole, resumed in results.values():
        assert resumed.keys() == whole.keys()
        for key, weight in whole.items():
            assert_close(resumed[key], weight, rtol=0, atol=1e-6)


def scaled_softsign(inputs):
    """A new activation with one coefficient, which takes one process and shared coefficients."""
    y = inputs.coefficients["scale"] * torch.nn.functional.softsign(inputs.x)
    return y if inputs.probs is None else y * inputs.probs.unsqueeze(-1)


def train_with_a_new_activation(options):
    entry = Activation(
        scaled_softsign, False, lambda order: {"scale": [2.0]}, TensorParallelSum.GRADIENTS
    )
    with patch.dict(ACTIVATIONS, {"scaled_softsign": entry}):
        config = small_config(options | {"model.activation": "scaled_softsign"})
        platform = select_platform("cpu")
        with process_groups(config, platform):
            state = build_state(config, platform, corpus=None)
            losses = []
            for _ in range(3):
                batches = random_batches(config, state.layout)
                losses.append(train_step(state, batches).lm_loss)
            parameters = dict(unwrap(state.chunks[0]).named_parameters())
            return losses, {n: p.detach() for n, p in parameters.items() if n.endswith(".scale")}


@pytest.mark.parametrize("options", [{}, EXPERTS], ids=["dense", "experts"])
def test_new_activation_is_one_entry_of_the_registry(options):
    losses, scales = run_on_ranks(train_with_a_new_activation, 1, options)[0]
    assert losses[2] < losses[0]
    assert len(scales) == 2  # layers
    assert all(scale.shape == (1,) and scale.item() not in (0.0, 2.0) for scale in scales.values())
