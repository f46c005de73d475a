"""Padding of the vocabulary is no part of the model: nothing depends on how many rows it has."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from layouts import Result, random_batches, result_of_model, small_config
from megatron.core import parallel_state

from megapoly.config import padded_vocab_size
from megapoly.model.builder import unwrap
from megapoly.platform.device import select_platform
from megapoly.preflight.parallel_check.whole_model import without_padding
from megapoly.testing import run_on_ranks
from megapoly.training.distributed import process_groups
from megapoly.training.state import build_state

# torch draws normal numbers in blocks of 16. A prime number of rows of this width ends within one,
# so drawn together with rows of padding its last numbers would be others.
WIDTH = {"model.hidden_size": 24}
T, P = "parallel.tensor_model_parallel_size", "parallel.pipeline_model_parallel_size"
LAYOUTS = {"one process": (1, {}), "TP 2": (2, {T: 2}), "TP 4": (4, {T: 4}), "PP 2": (2, {P: 2})}
# Vocabulary, multiple, rows with padding at TP 1, 2 and 4. At TP 4 the last rank has none of the 5.
SIZES = {
    "5": (5, 1, 5, 6, 8),
    "509": (509, 1, 509, 510, 512),
    "509 in 128s": (509, 128, 512, 512, 512),
    "50280": (50_280, 1, 50_280, 50_280, 50_280),
    "50280 in 128s": (50_280, 128, 50_304, 50_304, 50_304),
}
MODELS = {
    f"{size}{tied}": WIDTH
    | {
        "model.vocab_size": vocab_size,
        "model.make_vocab_size_divisible_by": multiple,
        "model.untie_embeddings_and_output_weights": not tied,
    }
    for size, (vocab_size, multiple, *_) in SIZES.items()
    for tied in ("", ", tied")
}
CASES = [
    (layout, model)
    for layout in LAYOUTS
    for model in MODELS
    if layout != "PP 2" or "in 128s" in model
]
VOCABULARY_KEYS = ("embedding.word_embeddings.weight", "output_layer.weight")


def config_of(layout, model):
    return small_config(MODELS[model] | LAYOUTS[layout][1])


@functools.cache
def at_layout(layout):
    """Of every model the result of its first step, and the logits of the last pipeline stage."""
    models = [model for case_layout, model in CASES if case_layout == layout]
    configs = {model: config_of(layout, model) for model in models}
    ranks = run_on_ranks(_on_rank, LAYOUTS[layout][0], configs)
    return {
        model: (
            Result([rank[model][0] for rank in ranks]),
            [rank[model][1] for rank in ranks if rank[model][1] is not None],
        )
        for model in models
    }


def _on_rank(configs):
    platform = select_platform("cpu")
    with process_groups(next(iter(configs.values())), platform):
        return {
            model: (result_of_model(config, platform), _logits(config, platform))
            for model, config in configs.items()
        }


def _logits(config, platform) -> dict[str, Any] | None:
    """This rank's logits of each micro-batch, the gathered ones of the first, and the labels."""
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        return None
    state = build_state(config, platform, corpus=None)
    batches = list(random_batches(config, state.layout))
    arguments = [(batch["tokens"], batch["position_ids"], None) for batch in batches]
    with torch.no_grad():
        return {
            "own": [unwrap(state.chunks[0])(*each) for each in arguments],
            "gathered": unwrap(state.chunks[0])(*arguments[0], runtime_gather_output=True),
            "labels": [batch["labels"] for batch in batches],
        }


def not_padded(model):
    """Result of the same model on one process, without padding."""
    return at_layout("one process")[model.replace(" in 128s", "")][0]


def losses(result):
    """Of each micro-batch; on the last pipeline stage."""
    return result.ranks[-1].losses


@pytest.mark.parametrize(("layout", "model"), CASES)
def test_rows_of_the_padding_are_zero(layout, model):
    config, (result, _) = config_of(layout, model), at_layout(layout)[model]
    vocab_size, _, *rows = SIZES[model.removesuffix(", tied")]
    expected = rows[LAYOUTS[layout][1].get(T, 1) // 2]
    assert padded_vocab_size(config) == expected
    for tensors in (result.weights, result.gradients):
        keys = VOCABULARY_KEYS[:1] if "tied" in model else VOCABULARY_KEYS
        assert [key for key in VOCABULARY_KEYS if key in tensors] == list(keys)
        for key in keys:
            assert len(tensors[key]) == expected
            assert tensors[key][:vocab_size].any()
            assert not tensors[key][vocab_size:].any(), key


@pytest.mark.parametrize(("layout", "model"), CASES)
def test_initial_weights_do_not_depend_on_the_padding(layout, model):
    vocab_size = MODELS[model]["model.vocab_size"]
    expected = not_padded(model).weights
    actual = without_padding(at_layout(layout)[model][0].weights, vocab_size)
    assert actual.keys() == expected.keys()
    for key, weight in expected.items():
        assert torch.equal(actual[key], weight), key


@pytest.mark.parametrize(("layout", "model"), CASES)
def test_losses_and_gradients_do_not_depend_on_the_padding(layout, model):
    vocab_size = MODELS[model]["model.vocab_size"]
    expected, actual = not_padded(model), at_layout(layout)[model][0]
    assert len(losses(expected)) == 2
    assert losses(actual) == pytest.approx(losses(expected), rel=1e-6)
    gradients = without_padding(actual.gradients, vocab_size)
    assert gradients.keys() == expected.gradients.keys()
    errors = {
        key: ((gradients[key] - gradient).norm() / gradient.norm()).item()
        for key, gradient in expected.gradients.items()
    }
    assert {key: error for key, error in errors.items() if not error < 1e-5} == {}
    for rank in actual.ranks:
        assert rank.grad_norm == pytest.approx(expected.norm_of_gradients, rel=1e-6)


@pytest.mark.parametrize(("layout", "model"), [case for case in CASES if case[0] != "PP 2"])
def test_loss_is_the_cross_entropy_over_the_vocabulary(layout, model):
    vocab_size = MODELS[model]["model.vocab_size"]
    result, ranks = at_layout(layout)[model]
    for i, (labels, loss) in enumerate(zip(ranks[0]["labels"], losses(result), strict=True)):
        logits = torch.cat([rank["own"][i] for rank in ranks], dim=-1)
        kept, padding = logits[..., :vocab_size], logits[..., vocab_size:]
        assert logits.shape[-1] == padded_vocab_size(config_of(layout, model))
        assert kept.isfinite().all() and (padding == -math.inf).all()
        expected = F.cross_entropy(kept.double().flatten(0, 1), labels.flatten())
        assert loss == pytest.approx(expected.item(), rel=1e-6)
        if i == 0:
            for rank in ranks:
                assert torch.equal(rank["gathered"], logits)
