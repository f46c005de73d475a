"""What is found inside a step: shares of the gradient norm, inputs of activations, first NaN."""

import math

import pytest
import torch
from spiking_jobs import DENSE, LAYOUTS, MOE, PIPELINE, TENSOR

from megapoly.config.recipes import FOLDER as RECIPES
from megapoly.model.builder import decoder_layers, unwrap
from megapoly.pretrain import configure, pretrain
from megapoly.testing import run_on_ranks
from megapoly.testing.jobs import shared_cache
from megapoly.training import step
from megapoly.training.distributed import sum_over_all
from megapoly.training.forward_inspection import inspect_forward
from megapoly.training.gradient_shares import first_gradient_not_finite, squares_of_gradients


def looked_at(look, recipe, options, run_dir, *, num_ranks):
    """Return ``look(state, batches, norm)`` of every rank, before the update of step 2."""
    fixed = {"run_dir": run_dir, "data.cache_dir": shared_cache().name}
    options = options | fixed | {"training.train_iters": 2, "checkpoint.save": False}
    argv = [f"--{name}={value}" for name, value in options.items()]
    return run_on_ranks(_job, num_ranks, argv, str(RECIPES / f"{recipe}.yaml"), look)


def _job(argv, recipe, look):
    found, update = [], step.update_parameters

    def looking(state, losses, *, batches, stop_requested):
        if state.iteration == 1:
            norm = step.gradient_norm(state.optimizer)
            found.append(look(state, batches, norm))
        return update(state, losses, batches=batches, stop_requested=stop_requested)

    step.update_parameters = looking
    pretrain(configure(argv, default_recipe=recipe, program="pretrain"))
    return found[0]


def squares_and_norm(state, batches, norm):
    squares = squares_of_gradients(state)
    return squares, sum_over_all([sum(squares.values())], state.platform)[0], norm


FAST = {"ep2-bf16-overlap", "pp2-bf16-tied"}


@pytest.mark.parametrize(
    "layout",
    [pytest.param(name, marks=[] if name in FAST else [pytest.mark.parallel]) for name in LAYOUTS],
)
def test_shares_add_up_to_the_norm_of_the_engine(tmp_path, layout):
    recipe, options = LAYOUTS[layout]
    ranks = looked_at(squares_and_norm, recipe, options, tmp_path, num_ranks=2)
    names = set()
    for squares, total, norm in ranks:
        assert math.sqrt(total) == pytest.approx(norm, rel=1e-6)
        names |= squares.keys()
    layers = {name.split(".")[2] for name in names if name.startswith("decoder.layers.")}
    assert layers == {str(i) for i in range(options["model.num_layers"])}
    assert not any("weight0" in name or "local_experts" in name for name in names)


def activations(state, batches, norm):
    """Return the inspection's values, and the same from FC1's outputs of the training's pass."""
    outputs = {}

    def keep(name):
        return lambda module, inputs, output: outputs.setdefault(name, []).append(output[0])

    handles = [
        layer.mlp.linear_fc1.register_forward_hook(keep(f"{layer.layer_number - 1}"))
        for layer in decoder_layers(state.chunks)
        if hasattr(layer.mlp, "linear_fc1")
    ]

    def forward(again):
        step.run_microbatches(state, again, state.layout.num_microbatches, forward_only=True)

    found = inspect_forward(state, batches, forward)
    for handle in handles:
        handle.remove()
    assert found.first is None and found.weights == []
    return found.activations, {name: torch.cat(rows).double() for name, rows in outputs.items()}


def test_inputs_of_activations_by_hand(tmp_path):
    eps = 1e-3
    ((found, outputs),) = looked_at(
        activations, "dense_tiny", DENSE | {"model.activation_eps": eps}, tmp_path, num_ranks=1
    )
    assert len(found) == len(outputs) == 2
    for layer, rows in outputs.items():
        entry = found[f"decoder.layers.{layer}.mlp.activation_func"]
        assert entry.largest == rows.abs().max().item()
        roots = [(rows.pow(2 * i).mean(-1) + eps).sqrt().max().item() for i in (1, 2, 3)]
        assert entry.roots == pytest.approx(roots, rel=1e-12)
        assert len(entry.coefficients) == 4 and entry.coefficients[1] == pytest.approx(1 / 3, 0.1)


@pytest.mark.parametrize(
    ("recipe", "options", "layout"),
    [
        ("dense_tiny", DENSE | {"model.activation": "gated_polynorm"}, TENSOR),
        pytest.param("moe_tiny", MOE, TENSOR, marks=pytest.mark.parallel),
        pytest.param("dense_tiny", DENSE, PIPELINE, marks=pytest.mark.parallel),
    ],
    ids=["gated-tp2", "moe-tp2", "pp2"],
)
def test_inputs_of_activations_are_those_of_one_process(tmp_path, recipe, options, layout):
    ((whole, _),) = looked_at(activations, recipe, options, tmp_path / "a", num_ranks=1)
    ranks = looked_at(activations, recipe, options | layout, tmp_path / "b", num_ranks=2)
    assert whole.keys() == ranks[0][0].keys() | ranks[1][0].keys()
    for name, expected in whole.items():
        parts = [found[name] for found, _ in ranks if name in found]
        assert max(part.largest for part in parts) == pytest.approx(expected.largest, rel=1e-4)
        roots = [max(each) for each in zip(*(part.roots for part in parts), strict=True)]
        assert roots == pytest.approx(expected.roots, rel=1e-4)


def spoilt_gradients(state, batches, norm):
    """Put NaN into the gradients of two parameters: the backward pass comes to the second first."""
    parameters = dict(unwrap(state.chunks[0]).named_parameters())
    for name in ("decoder.layers.0.mlp.linear_fc2.weight", "decoder.final_layernorm.weight"):
        parameters[name].main_grad.view(-1)[-1] = math.nan
    step.gradient_norm(state.optimizer)
    found = first_gradient_not_finite(state).name
    for chunk in state.chunks:
        chunk.zero_grad_buffer()
    step.gradient_norm(state.optimizer)
    return found


def test_the_gradient_nearest_to_the_loss_is_named(tmp_path):
    (found,) = looked_at(spoilt_gradients, "dense_tiny", DENSE, tmp_path, num_ranks=1)
    assert found == "decoder.final_layernorm.weight"


def weights_not_finite(state, batches, norm):
    def forward(again):
        step.run_microbatches(state, again, state.layout.num_microbatches, forward_only=True)

    weight = unwrap(state.chunks[0]).decoder.layers[1].mlp.linear_fc2.weight
    before = weight.data[0, 0].item()
    weight.data[0, 0] = math.inf
    found = inspect_forward(state, batches, forward)
    weight.data[0, 0] = before
    return found


def test_weights_and_the_first_output_are_named(tmp_path):
    (found,) = looked_at(weights_not_finite, "dense_tiny", DENSE, tmp_path, num_ranks=1)
    assert found.weights == ["decoder.layers.1.mlp.linear_fc2.weight"]
    assert found.first.module == "decoder.layers.1.mlp.linear_fc2"
    assert (found.first.micro_batch, found.first.stage) == (0, 0)
