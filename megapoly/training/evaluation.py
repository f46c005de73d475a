"""Loss and perplexity on the named validation sets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from megapoly.config.data_sources import MEAN, validation_sets
from megapoly.data.loader import evaluation_batches, num_evaluation_steps
from megapoly.data.samples import SamplePool
from megapoly.errors import DataError
from megapoly.training.distributed import owns_loss, sum_over_all
from megapoly.training.state import ModelState, evaluation_mode
from megapoly.training.step import run_microbatches


@dataclass(frozen=True)
class Evaluation:
    """Result on one validation set.

    Args:
        loss: mean cross-entropy of its tokens, nats.
        num_tokens: number of tokens in the mean.
    """

    loss: float
    num_tokens: int

    @property
    def ppl(self) -> float:
        """Perplexity, exp(loss); infinite if that overflows."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf


def evaluate_validation_sets(
    state: ModelState, validation: Mapping[str, SamplePool]
) -> dict[str, Evaluation]:
    """Evaluate every validation set, always on the same samples; collective.

    Args:
        state: a run in training, or a model alone.
        validation: samples of the sets that ``state.config.data`` names;
            ``training.eval_iters`` global batches of each are used.

    Returns:
        Results by name; with several sets also their ``mean``, which comes last.

    Raises:
        DataError: a set has no unmasked token.
    """
    with evaluation_mode(state):
        results = {name: _evaluate(state, name, pool) for name, pool in validation.items()}
    if len(results) > 1:
        sets = validation_sets(state.config.data)
        results[MEAN] = weighted_mean(results, {name: sets[name].weight for name in results})
    return results


def _evaluate(state: ModelState, name: str, pool: SamplePool) -> Evaluation:
    """Return the mean over all unmasked tokens of the set."""
    eval_iters = state.config.training.eval_iters
    batches = evaluation_batches(
        pool, state.layout, eval_iters=eval_iters, pin_memory=state.platform.is_cuda
    )
    steps = num_evaluation_steps(pool, state.layout, eval_iters)
    losses = run_microbatches(
        state, batches, steps * state.layout.num_microbatches, forward_only=True
    )
    counted = losses if owns_loss() else []
    local = [sum(float(loss[key]) for loss in counted) for key in ("sum", "num_tokens")]
    loss_sum, num_tokens = sum_over_all(local, state.platform)
    if num_tokens == 0:
        raise DataError(
            f"`data.validation` `{name}` must have tokens that are not masked, and all that were "
            "read are: with `data.eod_mask_loss` its documents have no token but their end. Use "
            "another set, or set `data.eod_mask_loss` to false."
        )
    return Evaluation(loss_sum / num_tokens, int(num_tokens))


def weighted_mean(
    results: Mapping[str, Evaluation], weights: Mapping[str, float | None]
) -> Evaluation:
    """Return the mean over several sets.

        loss = sum_i w_i loss_i / sum_i w_i

    Its perplexity is exp(loss), the weighted geometric mean of the perplexities.

    Args:
        results: by name.
        weights: w_i by name; None: the number of tokens in the result.
    """
    used = {name: _weight(result, weights[name]) for name, result in results.items()}
    total = sum(used[name] * result.loss for name, result in results.items())
    num_tokens = sum(result.num_tokens for result in results.values())
    return Evaluation(total / sum(used.values()), num_tokens)


def _weight(result: Evaluation, weight: float | None) -> float:
    return result.num_tokens if weight is None else weight
