"""One optimizer step, and the forward pass that training and evaluation share."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.moe.moe_utils import (
    clear_aux_losses_tracker,
    get_moe_layer_wise_logging_tracker,
    reduce_aux_losses_tracker_across_ranks,
)
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor
from torch.profiler import record_function

from megapoly.data.loader import Batch
from megapoly.errors import DivergenceError
from megapoly.training.distributed import owns_loss, sum_over_all
from megapoly.training.loss import Losses, masked_mean, mean_tokens_per_microbatch
from megapoly.training.state import ModelState, TrainState
from megapoly.training.watchdog import heartbeat

T = TypeVar("T")
# Takes the next micro-batch. Returns the model's output and a function that turns the last stage's
# output into this rank's share of the loss and something to collect.
ForwardStep = Callable[
    [Iterator[Batch], torch.nn.Module], tuple[Tensor, Callable[[Tensor], tuple[Tensor, T]]]
]


@dataclass
class StepResult:
    """Result of one step.

    Args:
        lm_loss: mean cross-entropy that the step trained on (:mod:`megapoly.training.loss`), nats.
        grad_norm: global norm before clipping.
        learning_rate: the one that the step used.
        stop_requested: some process was requested to stop.
        aux_losses: means over layers and micro-batches, unweighted, by the engine's names.
    """

    lm_loss: float
    grad_norm: float
    learning_rate: float
    stop_requested: bool = False
    aux_losses: dict[str, float] = field(default_factory=dict)


def train_step(
    state: TrainState, batches: Iterator[Batch], *, stop_requested: bool = False
) -> StepResult:
    """Accumulate the gradient of one global batch and update the parameters.

    Args:
        state: changed in place, including its position.
        batches: this rank's micro-batches.
        stop_requested: whether this process was requested to stop.

    Raises:
        DataError: every token of the step is masked.
        DivergenceError: loss or gradient norm is not finite.
    """
    with record_function("gradients"):
        losses = compute_gradients(state, batches)
    with record_function("update"):
        return update_parameters(state, losses, stop_requested=stop_requested)


def compute_gradients(state: TrainState, batches: Iterator[Batch]) -> list[Losses]:
    """Accumulate the gradient of one global batch, reduced over the ranks, in ``main_grad``."""
    for chunk in state.chunks:
        chunk.zero_grad_buffer()
    state.optimizer.zero_grad()
    number, divisor = state.layout.num_microbatches, None
    if state.config.training.calculate_per_token_loss:
        # The tokens of the whole step are counted before its first backward pass.
        step = list(itertools.islice(batches, number))
        batches, divisor = iter(step), mean_tokens_per_microbatch(step, state.platform)
    return run_microbatches(state, batches, number, forward_only=False, divisor=divisor)


def update_parameters(
    state: TrainState, losses: list[Losses], *, stop_requested: bool = False
) -> StepResult:
    """Clip the gradients, update the parameters and move to the next step."""
    learning_rate = state.learning_rate
    _, grad_norm, _ = state.optimizer.step()
    state.scheduler.step(increment=state.config.training.global_batch_size)
    state.iteration += 1
    lm_loss, stop = _mean_loss(state, losses, stop_requested)
    if not (math.isfinite(lm_loss) and math.isfinite(grad_norm)):
        raise DivergenceError(
            f"Step {state.iteration}: loss {lm_loss}, gradient norm {grad_norm}; both must be "
            "finite. Nothing of this step is saved: resume from the newest checkpoint with a lower "
            "`optimizer.lr` or a longer warm-up."
        )
    return StepResult(lm_loss, float(grad_norm), learning_rate, stop, _aux_losses(state))


def run_microbatches(
    state: ModelState,
    batches: Iterator[Batch],
    num_microbatches: int,
    *,
    forward_only: bool,
    divisor: float | None = None,
) -> list[Losses]:
    """Return the cross-entropy of each micro-batch on the last stage; an empty list elsewhere.

    Args:
        state: has the model.
        batches: this rank's micro-batches.
        num_microbatches: number of them.
        forward_only: compute no gradients.
        divisor: of :func:`megapoly.training.loss.masked_mean`.
    """
    training = state.config.training
    return run_schedule(
        state,
        partial(_forward_step, state.platform.device, divisor),
        batches,
        num_microbatches,
        micro_batch_size=training.micro_batch_size,
        seq_length=training.seq_length,
        forward_only=forward_only,
    )


def run_schedule(
    state: ModelState,
    forward_step: ForwardStep[T],
    batches: Iterator[Batch],
    num_microbatches: int,
    *,
    micro_batch_size: int,
    seq_length: int,
    forward_only: bool,
) -> list[T]:
    """Run micro-batches of one shape through the engine's pipeline schedule.

    Args:
        state: has the model.
        forward_step: called for each micro-batch, in an interleaved pipeline for each chunk.
        batches: this rank's micro-batches.
        num_microbatches: number of them; in an interleaved pipeline a multiple of the stages.
        micro_batch_size: sequences in each.
        seq_length: tokens in each sequence.
        forward_only: compute no gradients.

    Returns:
        On the last stage what ``forward_step`` collects for each micro-batch; elsewhere an empty
        list.
    """

    def advance(batches: Iterator[Batch], model: torch.nn.Module) -> tuple[Tensor, Any]:
        heartbeat.beat()
        return forward_step(batches, model)

    num_chunks = len(state.chunks)
    model: Any = state.chunks if num_chunks > 1 else state.chunks[0]
    return get_forward_backward_func()(
        forward_step_func=advance,
        # In an interleaved pipeline every chunk runs each micro-batch.
        data_iterator=batches if num_chunks == 1 else list(itertools.tee(batches, num_chunks)),
        model=model,
        num_microbatches=num_microbatches,
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
    )


def _forward_step(
    device: torch.device, divisor: float | None, batches: Iterator[Batch], model: torch.nn.Module
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Losses]]]:
    """Run the model on a micro-batch; the engine's schedules call it."""
    batch = {key: value.to(device, non_blocking=True) for key, value in next(batches).items()}
    batch = get_batch_on_this_cp_rank(batch)
    token_losses = model(
        batch["tokens"], batch["position_ids"], attention_mask=None, labels=batch["labels"]
    )
    return token_losses, partial(masked_mean, divisor, batch["loss_mask"])


def _mean_loss(state: TrainState, losses: list[Losses], stop_requested: bool) -> tuple[float, bool]:
    """Return the mean over the micro-batches of all ranks, and whether any was asked to stop."""
    means = [loss["mean"] for loss in losses] if owns_loss() else []
    local_sum = torch.stack(means).sum().item() if means else 0.0
    total, count, stop = sum_over_all(
        [local_sum, len(means), float(stop_requested)], state.platform
    )
    return total / count, stop > 0


def _aux_losses(state: TrainState) -> dict[str, float]:
    """Return the auxiliary losses: means over layers and micro-batches of all ranks."""
    if not state.config.model.num_moe_experts:
        return {}
    tracker = get_moe_layer_wise_logging_tracker()
    for entry in tracker.values():
        if entry["reduce_group"] is None:
            # The engine reports each rank's own z-loss (moe/router.py:505).
            entry["avg_group"] = parallel_state.get_tensor_and_data_parallel_group(
                with_context_parallel=True
            )
    reduce_aux_losses_tracker_across_ranks()
    scale = 1.0 / (state.layout.num_microbatches * state.config.model.num_layers)
    losses = {name: entry["values"].sum().item() * scale for name, entry in tracker.items()}
    clear_aux_losses_tracker()
    return losses
