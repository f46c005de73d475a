"""Process groups, random state, and sums over all processes."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megapoly.checkpoints.verify import Ranks
from megapoly.config import Config
from megapoly.platform import interfaces, launcher
from megapoly.platform.device import Platform
from megapoly.platform.meeting import join
from megapoly.training.random_state import seed_generators
from megapoly.training.watchdog import heartbeat

T = TypeVar("T")


@contextlib.contextmanager
def process_group(
    config: Config, platform: Platform, *, alone: bool = False
) -> Iterator[dist.Store]:
    """Create torch's process group, and destroy it at the end; yields the job's key-value store.

    Rank and size come from torchrun's environment; without it the job is one process.

    Args:
        config: sets the timeout of collectives.
        platform: sets the backend.
        alone: one process, whatever the environment says.

    Raises:
        PeerError: the processes of the job do not meet; see :func:`megapoly.platform.meeting.join`.
        LaunchError: a variable names a network interface that this host does not have.
    """
    timeout = datetime.timedelta(minutes=config.parallel.distributed_timeout_minutes)
    store: dist.Store = dist.HashStore()
    rank, world_size = 0, 1
    if launcher.is_launched() and not alone:
        with heartbeat.meeting():
            store, rank, world_size = join(), launcher.rank(), launcher.world_size()
        store.set_timeout(timeout)
    with interfaces.explained(platform.backend):
        dist.init_process_group(
            platform.backend,
            timeout=timeout,
            store=dist.PrefixStore("torch", store),
            rank=rank,
            world_size=world_size,
        )
    try:
        yield dist.PrefixStore("megapoly", store)
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def model_groups(config: Config) -> Iterator[None]:
    """Create the engine's process groups and seed the generators; destroy the groups at the end."""
    parallel = config.parallel
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
            context_parallel_size=parallel.context_parallel_size,
            expert_model_parallel_size=parallel.expert_model_parallel_size,
            expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
            distributed_timeout_minutes=parallel.distributed_timeout_minutes,
        )
        seed_generators(config.training.seed)
        yield
    finally:
        parallel_state.destroy_model_parallel()


@contextlib.contextmanager
def process_groups(config: Config, platform: Platform, *, alone: bool = False) -> Iterator[None]:
    """Create the groups of :func:`process_group` and :func:`model_groups`."""
    with process_group(config, platform, alone=alone), model_groups(config):
        yield


def is_rank_zero() -> bool:
    """Return whether this is the process that reports and writes."""
    return dist.get_rank() == 0


def on_rank_zero(decide: Callable[[], T]) -> T:
    """Return on every rank what a function returns on rank 0; collective.

    For what files decide: hosts may see those of others late. What it returns is pickled.
    """
    decided: list[Any] = [decide() if is_rank_zero() else None]
    dist.broadcast_object_list(decided)
    result: T = decided[0]
    return result


def all_ranks() -> Ranks:
    """Return the processes of the job, which share the work of verifying a checkpoint."""
    return Ranks(dist.get_rank(), dist.get_world_size(), _gather)


def _gather(own: Any) -> list[Any]:
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, own)
    return gathered


def owns_loss() -> bool:
    """Return whether this rank's losses count, so that each sample counts once.

    Only the last pipeline stage has losses. Its ranks of one tensor- and context-parallel group all
    have the losses of the same samples.
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
