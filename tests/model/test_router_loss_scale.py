"""Router losses of the recipes have the strength of the fork of megablocks that the release uses.

With L layers, T tokens, E experts, k of them a token, n_le tokens of layer l in expert e, p the
router's probabilities and z its logits, that fork computes for a weight of 0.01 and of 0.001

    balancing = 0.01 E / (L T k) sum_le n_le mean_t p_lte
    z-loss = 0.001 / (L T k) sum_lt logsumexp_e(z_lte)^2
"""

import pytest
import torch
from layouts import EXPERTS, random_batches, small_config
from megatron.core.transformer.moe.moe_utils import switch_load_balancing_loss_func, z_loss_func
from torch import Tensor
from torch.nn.functional import linear
from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func

from megapoly.config import load_recipe
from megapoly.platform.device import select_platform
from megapoly.testing import run_on_ranks
from megapoly.training.distributed import process_groups
from megapoly.training.state import build_state
from megapoly.training.step import compute_gradients

LAYERS, EXPERTS_PER_LAYER, TOPK = 16, 64, 8


def megablocks(logits: Tensor, num_layers: int, topk: int) -> Tensor:
    """Both losses of the layers in ``logits`` [l, t, e], which may be some of ``num_layers``."""
    probabilities = logits.softmax(-1)
    chosen = probabilities.topk(topk).indices
    counts = torch.zeros_like(logits).scatter_(-1, chosen, 1.0).sum(1)
    num_tokens, num_experts = logits.shape[1:]
    divisor = num_layers * num_tokens * topk
    balancing = 0.01 * num_experts / divisor * (counts * probabilities.mean(1)).sum()
    return balancing + 0.001 / divisor * logits.logsumexp(-1).square().sum()


@pytest.mark.parametrize("name", ["moe_7b_paper", "moe_7b_released"])
def test_recipes_have_the_strength_of_the_release(name):
    model = load_recipe(name).model
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(
        LAYERS, 48, EXPERTS_PER_LAYER, dtype=torch.float64, generator=generator
    )
    logits += torch.randn(LAYERS, 1, EXPERTS_PER_LAYER, dtype=torch.float64, generator=generator)
    total = torch.zeros(())
    for layer in logits:
        probabilities = layer.softmax(-1)
        counts = probabilities.topk(TOPK).indices.flatten().bincount(minlength=EXPERTS_PER_LAYER)
        total = total + switch_load_balancing_loss_func(
            probabilities, counts, len(layer), TOPK, EXPERTS_PER_LAYER, model.moe_aux_loss_coeff
        )
        total = total + z_loss_func(layer, model.moe_z_loss_coeff)
    assert (model.num_layers, model.num_moe_experts, model.moe_router_topk) == (
        LAYERS,
        EXPERTS_PER_LAYER,
        TOPK,
    )
    assert total.item() == pytest.approx(megablocks(logits, LAYERS, TOPK).item(), rel=1e-9)


def test_transformers_pools_the_layers_and_multiplies_by_topk():
    """As the table of docs/explanation/losses.md says."""
    generator = torch.Generator().manual_seed(2)
    logits = 3 * torch.randn(4, 48, 8, dtype=torch.float64, generator=generator)
    probabilities = logits.softmax(-1)
    chosen = torch.zeros_like(logits).scatter_(-1, probabilities.topk(2).indices, 1.0)
    fractions = chosen.mean((0, 1)) / 2
    expected = 2 * 8 * (fractions * probabilities.mean((0, 1))).sum()
    actual = load_balancing_loss_func(tuple(logits), num_experts=8, top_k=2)
    assert actual.item() == pytest.approx(expected.item(), rel=1e-6)  # it counts in fp32
    of_each = 2 * 8 * (chosen.mean(1) / 2 * probabilities.mean(1)).sum(-1)
    assert abs(actual.item() / of_each.mean().item() - 1) > 1e-3


def router_gradients():
    """Gradient of the last layer's router, and that of the formula on the router's inputs.

    All tokens are masked, so that only router losses have gradients; the last layer's router
    receives none from other layers.
    """
    recipe = load_recipe("moe_7b_released").model
    options = {
        f"model.{name}": getattr(recipe, name)
        for name in (
            *("num_layers", "num_moe_experts", "moe_router_topk", "moe_router_pre_softmax"),
            *("moe_aux_loss_coeff", "moe_z_loss_coeff"),
        )
    }
    config = small_config(
        EXPERTS | options | {"training.global_batch_size": 4, "training.micro_batch_size": 2}
    )
    platform = select_platform("cpu")
    with process_groups(config, platform):
        state = build_state(config, platform, corpus=None)
        (router,) = (
            module
            for name, module in state.chunks[0].named_modules()
            if name.endswith(f"layers.{LAYERS - 1}.mlp.router")
        )
        inputs = []
        router.register_forward_hook(lambda _, given, output: inputs.append(given[0].detach()))
        batches = list(random_batches(config, state.layout))
        for batch in batches:
            batch["loss_mask"].zero_()
        compute_gradients(state, iter(batches))
        weight = router.weight.detach().double().requires_grad_()
        for x in inputs:  # [s, b, h]
            logits = linear(x.double().flatten(0, 1), weight)
            (megablocks(logits[None], LAYERS, TOPK) / len(inputs)).backward()
        return len(inputs), router.weight.main_grad, weight.grad


def test_training_applies_that_strength():
    num_microbatches, actual, expected = run_on_ranks(router_gradients, 1)[0]
    assert num_microbatches == 2
    assert expected.norm() > 1e-6
    assert (actual - expected).norm() < 1e-4 * expected.norm()
