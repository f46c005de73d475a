"""Train a few steps at a layout and return everything that must not depend on it."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from megapoly.config import Config
from megapoly.config.schema import BlendSource
from megapoly.data.builtin import builtin_documents
from megapoly.data.corpus import load_corpus
from megapoly.data.token_files import pair_paths, write_token_file
from megapoly.data.tokenizer import load_tokenizer
from megapoly.platform.device import select_platform
from megapoly.preflight.layouts import Layout
from megapoly.preflight.local_ranks import run_on_ranks
from megapoly.preflight.parallel_check.whole_model import (
    ParameterShard,
    assemble,
    gradient_shards,
    without_padding,
)
from megapoly.training.distributed import model_groups, process_group
from megapoly.training.rank_zero_first import RankZeroFirst
from megapoly.training.state import TrainState, build_state
from megapoly.training.step import compute_gradients, update_parameters

_NUM_CHAPTERS = 40


@dataclasses.dataclass
class Step:
    """One step of training.

    Args:
        losses: cross-entropy (``lm_loss``) and the router's losses.
        grad_norm: global norm before clipping.
        gradients: of the whole model, by the parameters' names in a checkpoint; fp32.
        disagreements: how much ranks differ that should hold the same gradient, by these names.
    """

    losses: dict[str, float]
    grad_norm: float
    gradients: dict[str, Tensor]
    disagreements: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class _RankStep:
    losses: dict[str, float]
    grad_norm: float
    gradients: list[ParameterShard]


def train_at(config: Config, layout: Layout, *, cache_dir: Path, timeout_s: float) -> list[Step]:
    """Train on CPU processes, one thread each, with gloo.

    Args:
        config: resolved, for one process.
        layout: layout to train at.
        cache_dir: folder for the tokenized text.
        timeout_s: seconds for the whole job.

    Raises:
        RuntimeError: a rank failed; with its traceback.
        TimeoutError: a rank did not end in time.
    """
    config = layout.applied_to(config)
    set_data(config, cache_dir)
    ranks = run_on_ranks(steps_of_rank, layout.world_size, config, timeout_s=timeout_s)
    assert config.model.vocab_size is not None
    return [_whole_step(steps, config.model.vocab_size) for steps in zip(*ranks, strict=True)]


def set_data(config: Config, cache_dir: Path) -> None:
    """Set the built-in text; paragraphs as documents if the loss depends on where these end.

    Chapters, the documents of the built-in text, end in one of 84 samples of 64 tokens.
    """
    config.data.cache_dir = str(cache_dir)
    if not config.data.eod_mask_loss:
        return
    prefix = cache_dir / "paragraphs"
    if not pair_paths(prefix)[1].is_file():
        documents = builtin_documents()[:_NUM_CHAPTERS]
        write_token_file(
            prefix,
            (part for document in documents for part in document.text.split("\n\n") if part),
            load_tokenizer(None),
        )
    config.data.blend = [BlendSource(str(prefix), epochs=1, name="paragraphs")]


def _whole_step(ranks: Sequence[_RankStep], vocab_size: int) -> Step:
    gradients = assemble(shard for rank in ranks for shard in rank.gradients)
    tensors = without_padding(gradients.tensors, vocab_size)
    return Step(ranks[0].losses, ranks[0].grad_norm, tensors, gradients.disagreements)


def steps_of_rank(config: Config) -> list[_RankStep]:
    """Train on this rank; every process of the job calls this."""
    warnings.filterwarnings("ignore")  # the engine's, about optional packages and names of torch
    platform = select_platform("cpu")
    with process_group(config, platform) as store:
        with RankZeroFirst.of_job(store, config) as rank_zero_first:
            corpus = load_corpus(config, tokenizer=load_tokenizer(None), first=rank_zero_first.run)
        with model_groups(config):
            return _steps(build_state(config, platform, corpus))


def _steps(state: TrainState) -> list[_RankStep]:
    batches = state.training_batches()
    steps = []
    for _ in itertools.repeat(None, state.config.training.train_iters or 0):
        losses = compute_gradients(state, batches)
        gradients = gradient_shards(state.chunks)
        result = update_parameters(state, losses)
        steps.append(
            _RankStep({"lm_loss": result.lm_loss} | result.aux_losses, result.grad_norm, gradients)
        )
    return steps
