"""Small models at several layouts: weights and gradients, gathered from all ranks.

A layout is a number of ranks and options of ``parallel``. One job builds every model of a layout,
makes one global batch of gradients of each, and returns the parts that a rank holds by their places
in a checkpoint. Put together they must not depend on the layout.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker
from torch import Tensor

from megapoly.config import Config
from megapoly.config.options import OPTIONS
from megapoly.config.resolve import resolve
from megapoly.data.loader import Batch, BatchLayout
from megapoly.model.builder import unwrap
from megapoly.platform.device import select_platform
from megapoly.platform.machine import CPU
from megapoly.preflight.parallel_check.whole_model import (
    ParameterShard,
    assemble,
    gradient_shards,
    weight_shards,
)
from megapoly.testing import run_on_ranks
from megapoly.training.distributed import process_groups
from megapoly.training.state import TrainState, build_state
from megapoly.training.step import compute_gradients

# Weights are large enough for every power of the activation to matter.
SMALL = {
    "model.num_layers": 2,
    "model.hidden_size": 32,
    "model.num_attention_heads": 4,
    "model.ffn_hidden_size": 48,
    "model.vocab_size": 128,
    "model.init_method_std": 0.3,
    "model.activation_backend": "reference",
    "training.device": "cpu",
    "training.train_iters": 1,
    "training.seq_length": 16,
    "training.micro_batch_size": 1,
    "training.global_batch_size": 2,
}
EXPERTS = {
    "model.num_moe_experts": 4,
    "model.moe_router_topk": 2,
    "model.moe_ffn_hidden_size": 24,
}


def small_config(options: dict[str, Any]) -> Config:
    """A resolved configuration of a small model with options set by their dotted names."""
    config = Config()
    for name, value in (SMALL | options).items():
        assert name in OPTIONS, name
        section, _, field = name.rpartition(".")
        setattr(getattr(config, section), field, value)
    return resolve(config, tokenizer_vocab_size=128, machine=CPU)


@dataclasses.dataclass
class RankResult:
    """Of one model on one rank."""

    weights: list[ParameterShard]
    gradients: list[ParameterShard]
    losses: list[float]  # of its micro-batches
    grad_norm: float
    decay: dict[str, bool]


@dataclasses.dataclass
class Result:
    """Of one model, whole."""

    ranks: list[RankResult]

    @functools.cached_property
    def weights(self) -> dict[str, Tensor]:
        """Initial weights, by their names in a checkpoint."""
        return _agreed(part for rank in self.ranks for part in rank.weights)

    @functools.cached_property
    def gradients(self) -> dict[str, Tensor]:
        """Gradients of the global batch, by the same names."""
        return _agreed(part for rank in self.ranks for part in rank.gradients)

    @property
    def norm_of_gradients(self) -> float:
        """Root of the sum of squares of all gradients, each counted once."""
        return math.sqrt(sum(g.double().square().sum().item() for g in self.gradients.values()))

    @property
    def decay(self) -> dict[str, bool]:
        """Whether weight decay applies, by the parameter's name."""
        return {name: decays for rank in self.ranks for name, decays in rank.decay.items()}


def run_models(
    models: dict[str, dict[str, Any]], num_ranks: int, layout: dict[str, Any]
) -> dict[str, Result]:
    """Weights and gradients of every model at a layout."""
    configs = {name: small_config(options | layout) for name, options in models.items()}
    ranks = run_on_ranks(_results_of_rank, num_ranks, configs)
    return {name: Result([rank[name] for rank in ranks]) for name in configs}


def _results_of_rank(configs: dict[str, Config]) -> dict[str, RankResult]:
    platform = select_platform("cpu")
    with process_groups(next(iter(configs.values())), platform):
        return {name: result_of_model(config, platform) for name, config in configs.items()}


def result_of_model(config: Config, platform: Any) -> RankResult:
    """What this rank has of a model's first step; process groups must exist."""
    get_moe_layer_wise_logging_tracker().clear()  # as long as the last model's layers
    state = build_state(config, platform, corpus=None)
    parameters = {
        f"{i}.{name}": parameter
        for i, chunk in enumerate(state.chunks)
        for name, parameter in unwrap(chunk).named_parameters()
    }
    weights = weight_shards(state.chunks)
    losses = compute_gradients(state, random_batches(config, state.layout))
    gradients = gradient_shards(state.chunks)
    decay = _decay(state, parameters)
    _, grad_norm, _ = state.optimizer.step()
    means = [loss["mean"].item() for loss in losses]
    return RankResult(weights, gradients, means, float(grad_norm), decay)


def random_batches(config: Config, layout: BatchLayout, *, step: int = 0) -> Iterator[Batch]:
    """This rank's micro-batches of a step; a sample depends on its place alone.

    With ``eod_mask_loss`` samples have very different numbers of unmasked tokens, every fourth has
    none.
    """
    length, vocab_size = config.training.seq_length, config.model.vocab_size
    for places in layout.micro_batches(step * layout.global_batch_size):
        samples, masks = [], []
        for place in places:
            generator = torch.Generator().manual_seed(place)
            samples.append(torch.randint(vocab_size, (length + 1,), generator=generator))
            kept = (0.9, 0.2, 0.0, 0.5)[place % 4] if config.data.eod_mask_loss else 1.0
            masks.append((torch.rand(length, generator=generator) < kept).float())
        tokens = torch.stack(samples)
        yield {
            "tokens": tokens[:, :-1],
            "labels": tokens[:, 1:],
            "loss_mask": torch.stack(masks),
            "position_ids": torch.arange(length).expand(len(tokens), -1),
        }


def whole_weights(state: TrainState) -> dict[str, Tensor]:
    """Weights of a model on a single rank, by their names in a checkpoint."""
    return _agreed(weight_shards(state.chunks))


def _agreed(parts: Iterable[ParameterShard]) -> dict[str, Tensor]:
    """Tensors of the whole model: no part may be missing, and its holders agree to the bit."""
    result = assemble(parts)
    assert not result.disagreements
    for name, tensor in result.tensors.items():
        assert not tensor.isnan().any(), f"not all of {name} is there"
    return result.tensors


def _decay(state: TrainState, parameters: dict[str, Tensor]) -> dict[str, bool]:
    """Whether weight decay applies, by the parameter's name."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    decay = {}
    for group in state.optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) in names:
                decay[names[id(parameter)]] = group["wd_mult"] != 0.0
    return decay
