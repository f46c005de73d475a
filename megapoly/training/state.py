"""State on one rank: a model, or a whole training run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megapoly.config import Config
from megapoly.config.step_ranges import joined, step_ranges
from megapoly.data.corpus import Corpus
from megapoly.data.loader import Batch, BatchLayout, training_batches
from megapoly.model.builder import build_model
from megapoly.platform.device import Platform
from megapoly.training.optimizer import build_optimizer, build_scheduler, train_samples
from megapoly.training.spikes import RecentSteps


@dataclass
class ModelState:
    """A model that can run forward.

    Args:
        config: resolved.
        platform: device of this rank.
        chunks: this rank's part of the model: one chunk, or several in an interleaved pipeline.
        layout: how a global batch is split.
    """

    config: Config
    platform: Platform
    chunks: list[MegatronModule]
    layout: BatchLayout


@dataclass(frozen=True)
class Position:
    """How far a run is, all ranks together.

    Args:
        iteration: finished steps.
        samples: samples that they trained on.
        tokens: tokens that they trained on.
    """

    iteration: int = 0
    samples: int = 0
    tokens: int = 0


@dataclass
class TrainState(ModelState):
    """Model, optimizer, data and position.

    Args:
        config: resolved.
        platform: device of this rank.
        chunks: see :class:`ModelState`; wrapped for data parallelism.
        layout: how a global batch is split.
        corpus: training and validation samples.
        optimizer: of the engine.
        scheduler: of the engine; counts samples.
        iteration: number of finished steps.
        start: position from which this job trains, set by :meth:`start_from`. Earlier steps may
            have had another batch size or sequence length.
        add_bos: benchmarks begin texts with BOS: recorded by the imported checkpoint that the run
            started from.
        passed_over: steps whose batches the run has passed over, in order.
    """

    chunks: list[DistributedDataParallel]
    corpus: Corpus
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    iteration: int = 0
    start: Position = Position()
    add_bos: bool = False
    passed_over: list[range] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Begin to remember steps."""
        self.recent_steps = RecentSteps(self.config.training)

    def start_from(self, start: Position) -> None:
        """Move to a position, of data and schedule also."""
        self.start, self.iteration = start, start.iteration
        self.scheduler.num_steps = start.samples
        self.scheduler.step(increment=0)

    @property
    def train_iters(self) -> int:
        """Number of the run's last step.

        The run ends after as many samples as ``training.train_iters`` steps of its batch size have,
        so this is another number after steps of another batch size.
        """
        remaining = train_samples(self.config) - self.start.samples
        steps = -(-remaining // self.config.training.global_batch_size)
        return self.start.iteration + max(0, steps)

    @property
    def consumed_samples(self) -> int:
        """Samples that the run has trained on, all ranks together."""
        steps = self.iteration - self.start.iteration
        return self.start.samples + steps * self.config.training.global_batch_size

    @property
    def consumed_tokens(self) -> int:
        """Tokens that the run has trained on, all ranks together."""
        samples = self.consumed_samples - self.start.samples
        return self.start.tokens + samples * self.config.training.seq_length

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def pass_over(self) -> range | None:
        """Move past the next steps if ``training.skip_batches`` lists them, without training.

        Returns:
            These steps; None if the next step is not listed.
        """
        listed = step_ranges(self.config.training.skip_batches)
        found = next((steps for steps in listed if self.iteration + 1 in steps), None)
        if found is None or self.iteration >= self.train_iters:
            return None
        passed = range(self.iteration + 1, min(found.stop, self.train_iters + 1))
        self.iteration += len(passed)
        self.scheduler.step(increment=len(passed) * self.config.training.global_batch_size)
        self.passed_over = joined([*self.passed_over, passed])
        return passed

    def training_batches(self) -> Iterator[Batch]:
        """Return this rank's micro-batches from the current position on, without end."""
        return training_batches(
            self.corpus.train,
            self.corpus.train.order(self.config.data.seed),
            self.layout,
            consumed_samples=self.consumed_samples,
            num_workers=self.config.data.num_workers,
            pin_memory=self.platform.is_cuda,
        )


@contextlib.contextmanager
def gathered_parameters(state: ModelState, *, are_gathered: bool = False) -> Iterator[None]:
    """Give every parameter its newest value for the duration of a context.

    With ``overlap_param_gather`` the values of the last step are otherwise gathered by the next
    forward pass of training.

    Args:
        state: a run in training, or a model alone.
        are_gathered: they are gathered, because a forward pass has followed the last step.
            Gathering again would let the engine take the parameters of the next step for gathered
            (distributed/param_and_grad_buffer.py:300).
    """
    overlaps = state.config.parallel.overlap_param_gather
    for chunk in state.chunks if overlaps else []:
        chunk.disable_forward_pre_hook(param_sync=not are_gathered)
    try:
        yield
    finally:
        for chunk in state.chunks if overlaps else []:
            chunk.enable_forward_pre_hook()


@contextlib.contextmanager
def evaluation_mode(state: ModelState, *, are_gathered: bool = False) -> Iterator[None]:
    """Use the newest parameters, no dropout and no gradients for the duration of a context.

    Args:
        state: a run in training, or a model alone.
        are_gathered: of :func:`gathered_parameters`.
    """
    modes = [chunk.training for chunk in state.chunks]
    with gathered_parameters(state, are_gathered=are_gathered), torch.no_grad():
        for chunk in state.chunks:
            chunk.eval()
        try:
            yield
        finally:
            for chunk, mode in zip(state.chunks, modes, strict=True):
                chunk.train(mode)


def build_state(config: Config, platform: Platform, corpus: Corpus) -> TrainState:
    """Build model, optimizer and schedule at step 0; process groups must exist."""
    chunks = build_model(config, platform)
    optimizer = build_optimizer(config, chunks)
    _connect(chunks, optimizer, config)
    return TrainState(
        config,
        platform,
        chunks,
        batch_layout(config),
        corpus,
        optimizer,
        build_scheduler(config, optimizer),
    )


def batch_layout(config: Config) -> BatchLayout:
    """Return how a global batch is split for this rank; process groups must exist."""
    return BatchLayout(
        micro_batch_size=config.training.micro_batch_size,
        global_batch_size=config.training.global_batch_size,
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
    )


def _connect(
    chunks: list[DistributedDataParallel], optimizer: MegatronOptimizer, config: Config
) -> None:
    """Tell the engine's pipeline schedules how to scale, synchronise and finish gradients."""
    engine: TransformerConfig = chunks[0].config
    engine.grad_scale_func = optimizer.scale_loss
    engine.finalize_model_grads_func = finalize_model_grads
    if config.parallel.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in chunks]
        engine.no_sync_func = no_sync if len(chunks) > 1 else no_sync[0]
