"""One rank of a job without the other ranks, on the meta device."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megapoly.config import Config
from megapoly.errors import UnavailableError
from megapoly.platform.device import Platform
from megapoly.training.distributed import model_groups

META = Platform(torch.device("meta"), "fake")


@contextlib.contextmanager
def fake_rank(config: Config, rank: int, world_size: int) -> Iterator[Platform]:
    """Make this process one rank of a job, with all of the engine's groups; undo it at the end.

    Inside, a collective has the shapes that it would have and sends nothing, and the engine makes
    every tensor without data.

    Args:
        config: resolved, a layout that fits ``world_size``.
        rank: number of the rank.
        world_size: ranks of the job.

    Yields:
        The meta device.

    Raises:
        UnavailableError: this process is already part of a job.
    """
    # Registers the backend.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise UnavailableError(
            "a dry run builds one rank after another, and this process is already part of a job; "
            "start it in a separate process"
        )
    dist.init_process_group(META.backend, store=FakeStore(), rank=rank, world_size=world_size)
    try:
        with current_device(META.device), _only_own_groups(rank), model_groups(config):
            with META.device:
                yield META
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Replace an attribute of a module or class while the context is active."""
    is_inherited = isinstance(owner, type) and name not in vars(owner)
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if is_inherited:
            delattr(owner, name)
        else:
            setattr(owner, name, original)


def current_device(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Set the device of the engine's buffers, such as distributed/param_and_grad_buffer.py:806."""
    return replaced(torch.cuda, "current_device", lambda: device)


@contextlib.contextmanager
def _only_own_groups(rank: int) -> Iterator[None]:
    """Create only the groups that the rank is in, also those of gloo, as fake groups.

    ``initialize_model_parallel`` creates every group of the job, since a real backend needs that.
    For groups of other ranks a rank gets a placeholder either way, so they are not created, which
    would be done again for each rank that is built.
    """
    make = parallel_state.create_group

    def create_group(ranks: Sequence[int], backend: str | None = None, **options: Any) -> Any:
        if rank not in ranks:
            return dist.GroupMember.NON_GROUP_MEMBER
        return make(ranks, backend=None, **options)

    members = replaced(parallel_state, "generate_masked_orthogonal_rank_groups", _members_of_groups)
    with replaced(parallel_state, "create_group", create_group), members:
        yield


_engine_members = parallel_state.generate_masked_orthogonal_rank_groups


def _members_of_groups(
    world_size: int, parallel_size: list[int], mask: list[bool]
) -> list[list[int]]:
    """Return the engine's lists, which are the same for every rank, from a cache."""
    return _cached_members(world_size, tuple(parallel_size), tuple(mask))


@functools.lru_cache(maxsize=32)
def _cached_members(
    world_size: int, parallel_size: tuple[int, ...], mask: tuple[bool, ...]
) -> list[list[int]]:
    return _engine_members(world_size, list(parallel_size), list(mask))
