"""Micro-batches of one data-parallel rank.

Step n trains on positions n * G to (n + 1) * G of the sample order, where G is
``global_batch_size``. Its micro-batch k is positions [k * M, (k + 1) * M) of these, and rank r of D
takes micro-batches r, r + D, ... So the micro-batches of a step are the same at every data-parallel
size.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from megapoly.data.sample_order import EpochOrder, Order
from megapoly.data.samples import SamplePool
from megapoly.errors import ConfigError, DataError
from megapoly.platform.processes import die_with_parent

Batch = dict[str, Tensor]

# The order of evaluation does not depend on the seed of the training data.
EVALUATION_SEED = 0


@dataclass(frozen=True)
class BatchLayout:
    """How a global batch is split into micro-batches.

    Args:
        micro_batch_size: samples in one forward pass of one rank.
        global_batch_size: samples in one step over all ranks.
        data_parallel_rank: data-parallel rank of this process.
        data_parallel_size: number of ranks that see different samples.

    Raises:
        ConfigError: the global batch cannot be split evenly.
    """

    micro_batch_size: int
    global_batch_size: int
    data_parallel_rank: int = 0
    data_parallel_size: int = 1

    def __post_init__(self) -> None:
        """Check that every rank gets the same number of full micro-batches."""
        if self.global_batch_size % (self.micro_batch_size * self.data_parallel_size):
            raise ConfigError(
                [
                    f"`training.global_batch_size` ({self.global_batch_size}) must be divisible by "
                    f"`training.micro_batch_size` ({self.micro_batch_size}) times the "
                    f"data-parallel size ({self.data_parallel_size}); change one of the two sizes."
                ]
            )

    @property
    def num_microbatches(self) -> int:
        """Number of micro-batches of one rank in one step."""
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel_size)

    def micro_batches(self, first: int) -> Iterator[range]:
        """Yield the positions of this rank's micro-batches in the step that begins at ``first``."""
        size = self.micro_batch_size
        stride = size * self.data_parallel_size
        start = first + size * self.data_parallel_rank
        for position in range(start, first + self.global_batch_size, stride):
            yield range(position, position + size)


def training_batches(
    samples: Dataset[dict[str, Tensor]],
    order: Order,
    layout: BatchLayout,
    *,
    consumed_samples: int = 0,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Return an endless iterator over micro-batches.

    Args:
        samples: training samples, such as a blend.
        order: endless sequence of the keys of ``samples``.
        layout: how a step is split into micro-batches.
        consumed_samples: samples that all ranks together have trained on; where to resume.
        num_workers: processes that prefetch batches.
        pin_memory: copy batches into page-locked memory (CUDA only).

    Returns:
        ``tokens``, ``labels``, ``position_ids``: [micro_batch_size, seq_length] int64;
        ``loss_mask``: the same shape, fp32. A DataError of a sample is raised as it is.
    """
    batches = _TrainingBatches(order, layout, consumed_samples)
    return _with_plain_errors(iter(_data_loader(samples, batches, num_workers, pin_memory)))


def _with_plain_errors(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yield batches; an error of a worker comes with its stack trace as text, which is left out."""
    try:
        yield from batches
    except DataError as error:
        text = str(error).rpartition(f"{DataError.__module__}.{DataError.__name__}: ")[2]
        raise DataError(text.strip()) from None


def ended_worker(error: BaseException) -> str | None:
    """Return a sentence if an error says that a worker was killed or ended; None for others.

    torch raises such errors in the main process wherever that is at this moment.
    """
    match = re.match(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) ([^.\n]*)", str(error))
    if match is None or not isinstance(error, RuntimeError):
        return None
    return (
        f"the data worker {match[1]} {match[2].strip()}; the system kills a process when memory "
        "runs out, see `dmesg`: lower `data.num_workers`, or make room"
    )


def num_evaluation_steps(pool: SamplePool, layout: BatchLayout, eval_iters: int | None) -> int:
    """Return the number of global batches of one evaluation: at most as many as the set has."""
    whole_set = -(-len(pool) // layout.global_batch_size)
    return whole_set if eval_iters is None else min(eval_iters, whole_set)


def evaluation_batches(
    pool: SamplePool, layout: BatchLayout, *, eval_iters: int | None, pin_memory: bool = False
) -> Iterator[Batch]:
    """Return the micro-batches of one evaluation, the same every time.

    The samples are read in a fixed random order, so that a few global batches represent the whole
    set, and each at most once. Positions after the last sample are padded with samples whose
    ``loss_mask`` is zero, so that all ranks have the same number of micro-batches; a micro-batch
    may consist of padding only. The mean loss is the sum of ``loss * loss_mask`` over all ranks and
    micro-batches, divided by the sum of ``loss_mask``.

    Args:
        pool: validation samples.
        layout: how a global batch is split into micro-batches.
        eval_iters: global batches; None: the whole set.
        pin_memory: copy batches into page-locked memory (CUDA only).

    Returns:
        ``num_evaluation_steps * layout.num_microbatches`` batches as of :func:`training_batches`.
    """
    order = EpochOrder(len(pool), EVALUATION_SEED)
    batches = [
        [order[position] if position < len(pool) else None for position in positions]
        for step in range(num_evaluation_steps(pool, layout, eval_iters))
        for positions in layout.micro_batches(step * layout.global_batch_size)
    ]
    return iter(_data_loader(pool, batches, 0, pin_memory))


class _TrainingBatches:
    """Endless keys of the samples in this rank's micro-batches."""

    def __init__(self, order: Order, layout: BatchLayout, consumed_samples: int):
        self.order = order
        self.layout = layout
        self.consumed_samples = consumed_samples

    def __iter__(self) -> Iterator[list[Any]]:
        for first in count(self.consumed_samples, self.layout.global_batch_size):
            for positions in self.layout.micro_batches(first):
                yield [self.order[position] for position in positions]


def _data_loader(
    samples: Dataset[dict[str, Tensor]],
    batches: Iterable[list[Any]],
    num_workers: int,
    pin_memory: bool,
) -> DataLoader[Batch]:
    return DataLoader(
        samples,
        batch_sampler=batches,
        num_workers=num_workers,
        pin_memory=pin_memory,
        # Every new iterator draws a number; from the global generator, that would change dropout.
        generator=torch.Generator(),
        worker_init_fn=_begin_worker,
    )


def _begin_worker(worker: int) -> None:
    """End with the main process, and not by Ctrl-C: it needs its workers until it has saved."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
