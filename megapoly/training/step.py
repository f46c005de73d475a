"""One optimizer step, and the forward pass that training and evaluation share."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
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
from megapoly.training.distributed import is_rank_zero, owns_loss, sum_over_all
from megapoly.training.loss import Losses, masked_mean, mean_tokens_per_microbatch
from megapoly.training.optimizer import apply_gradients, gradient_norm
from megapoly.training.state import ModelState, TrainState
from megapoly.training.unusual_step import describe
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
        unusual: what is unusual about the step, for the user; empty for an ordinary step.
        num_skipped: steps of the run that were skipped, if this is one of them; else 0.
    """

    lm_loss: float
    grad_norm: float
    learning_rate: float
    stop_requested: bool = False
    aux_losses: dict[str, float] = field(default_factory=dict)
    unusual: str = ""
    num_skipped: int = 0


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
        DivergenceError: as :func:`update_parameters`.
    """
    kept: list[Batch] = []
    with record_function("gradients"):
        losses = compute_gradients(state, _keeping(batches, kept))
    with record_function("update"):
        return update_parameters(state, losses, batches=kept, stop_requested=stop_requested)


def _keeping(batches: Iterator[Batch], kept: list[Batch]) -> Iterator[Batch]:
    """Yield micro-batches, and keep them: an unusual step is looked at again."""
    for batch in batches:
        kept.append(batch)
        yield batch


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
    state: TrainState,
    losses: list[Losses],
    *,
    batches: Sequence[Batch] = (),
    stop_requested: bool = False,
) -> StepResult:
    """Clip the gradients, update the parameters and move to the next step.

    A step with a spike or a value that is not finite is decided on before anything changes, from
    numbers that all ranks share: ``training.spike_action``.

    Args:
        state: changed in place, including its position.
        losses: of :func:`compute_gradients`.
        batches: this rank's micro-batches, to look into an unusual step.
        stop_requested: whether this process was requested to stop.

    Raises:
        DivergenceError: the run is to end at this step; neither weights nor optimizer have changed.
    """
    own_norm = gradient_norm(state.optimizer)
    result = _measure(state, losses, own_norm, stop_requested)
    values = {"lm_loss": result.lm_loss, "grad_norm": result.grad_norm, **result.aux_losses}
    step, recent = state.iteration + 1, state.recent_steps
    unusual = recent.compare(values)
    if unusual:
        forward = partial(_forward_again, state)
        is_finite = all(each.is_finite for each in unusual)
        inside = describe(state, losses, batches, forward, grad_norm=own_norm, is_finite=is_finite)
        result.unusual = f"step {step}: " + "; ".join([*map(str, unusual), inside]).rstrip("; ")
        result.num_skipped = _decide(state, result.unusual, is_finite=is_finite)
    if not result.num_skipped:
        recent.add(step, values, is_unusual=bool(unusual))
        apply_gradients(state.optimizer, own_norm)
    state.scheduler.step(increment=state.config.training.global_batch_size)
    state.iteration = step
    return result


def _decide(state: TrainState, text: str, *, is_finite: bool) -> int:
    """Return how many steps were skipped if this one is to be, 0 if it is to be trained on.

    Raises:
        DivergenceError: the run is to end.
    """
    training, step, recent = state.config.training, state.iteration + 1, state.recent_steps
    if training.spike_action == "report" and is_finite:
        return 0
    why = "loss and gradient norm both must be finite"
    if training.spike_action == "stop":
        why = "`training.spike_action` is stop"
    elif training.spike_action == "skip":
        if recent.skip(step):
            return recent.num_skipped
        why = (
            f"{training.spike_max_skips} of the last {training.spike_window} steps were skipped, "
            "the most that `training.spike_max_skips` allows"
        )
    raise DivergenceError(f"{text}. The run ends before this step, because {why}.")


def _forward_again(state: TrainState, batches: Iterator[Batch]) -> None:
    run_microbatches(state, batches, state.layout.num_microbatches, forward_only=True)


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


def _measure(
    state: TrainState, losses: list[Losses], grad_norm: float, stop_requested: bool
) -> StepResult:
    """Return losses and gradient norm of a step, the same on all ranks to the bit.

    All ranks have the same norm and router losses, unless a device fails. What is not finite on one
    rank is not finite in the result, and a norm that is too large on one is
    not lost.
    """
    aux = _aux_losses(state)
    means = [loss["mean"] for loss in losses] if owns_loss() else []
    local_sum = torch.stack(means).sum().item() if means else 0.0
    own = 1.0 if is_rank_zero() else 0.0  # 0 times what is not finite is NaN
    total, count, stop, norms, *shared = sum_over_all(
        [local_sum, len(means), float(stop_requested), grad_norm, *(own * v for v in aux.values())],
        state.platform,
    )
    return StepResult(
        total / count,
        norms / dist.get_world_size(),
        state.learning_rate,
        stop > 0,
        dict(zip(aux, shared, strict=True)),
    )


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
