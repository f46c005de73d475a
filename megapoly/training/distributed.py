"""Process groups, random state, and sums over all processes."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megapoly.config import Config
from megapoly.platform import Platform
from megapoly.platform.engine_workarounds import seed_model_parallel_rng


@contextlib.contextmanager
def process_groups(config: Config, platform: Platform) -> Iterator[None]:
    """Create torch's and the engine's process groups and seed the generators; destroy them after.

    Rank and size come from torchrun's environment; without it the job is one process.
    """
    timeout = datetime.timedelta(minutes=config.parallel.distributed_timeout_minutes)
    if "RANK" in os.environ:
        dist.init_process_group(platform.backend, timeout=timeout)
    else:
        store = dist.HashStore()
        dist.init_process_group(
            platform.backend, timeout=timeout, store=store, rank=0, world_size=1
        )
    try:
        parallel = config.parallel
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
            context_parallel_size=parallel.context_parallel_size,
            expert_model_parallel_size=parallel.expert_model_parallel_size,
            expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
            distributed_timeout_minutes=parallel.distributed_timeout_minutes,
        )
        # Dropout differs between pipeline stages, as it does between layers.
        stage = parallel_state.get_pipeline_model_parallel_rank()
        seed_model_parallel_rng(config.training.seed + 100 * stage)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def is_rank_zero() -> bool:
    """Whether this is the process that reports and writes."""
    return dist.get_rank() == 0


@contextlib.contextmanager
def rank_zero_first() -> Iterator[None]:
    """Rank 0 runs the body before the others enter it."""
    if not is_rank_zero():
        dist.barrier()
    try:
        yield
    finally:
        # Also when the body fails on rank 0: the others then meet the same error, not a time-out.
        if is_rank_zero():
            dist.barrier()


def owns_loss() -> bool:
    """Whether this rank's losses count: the last pipeline stage, one rank of those that share it.

    Ranks of tensor and context parallelism know the loss of the same whole samples.
    """
    return (
        parallel_state.is_pipeline_last_stage()
        and parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_context_parallel_rank() == 0
    )


def sum_over_all(values: list[float], platform: Platform) -> list[float]:
    """Sum a few numbers over all processes, in fp64."""
    total = torch.tensor(values, dtype=torch.float64, device=platform.device)
    dist.all_reduce(total)
    return total.tolist()
