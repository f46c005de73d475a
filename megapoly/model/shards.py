"""The shards of a model's parameters, as a checkpoint stores them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor


def checkpoint_metadata() -> dict[str, Any]:
    """Return the metadata of the layout for the engine's ``sharded_state_dict``.

    ``fully_reshardable`` is the form of the distributed optimizer's state that loads at any layout.
    """
    return {
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "distrib_optim_sharding_type": "fully_reshardable",
    }


def tensor_entries(module: Any) -> dict[str, ShardedTensor | ShardedTensorFactory]:
    """Return the entries of a model chunk that have data: parameters and buffers, by name."""
    entries = module.sharded_state_dict(metadata=checkpoint_metadata())
    return {
        name: entry
        for name, entry in entries.items()
        if isinstance(entry, ShardedTensor | ShardedTensorFactory) and entry.data is not None
    }


def shards_of(entry: ShardedTensor | ShardedTensorFactory) -> Iterable[ShardedTensor]:
    """Return the entry, or the parts into which a factory splits it (halves of a gated FC1)."""
    shards: Iterable[ShardedTensor] = [entry] if isinstance(entry, ShardedTensor) else entry.build()
    return shards


def parameter_shards(
    chunks: Iterable[torch.nn.Module], values: Mapping[int, Tensor]
) -> Iterator[ShardedTensor]:
    """Yield this rank's shard of every parameter; the two matrices of a gated FC1 separately.

    Args:
        chunks: the rank's model chunks, unwrapped.
        values: what the shards hold, such as weights or gradients, by the ``id`` of the parameter.
    """
    for chunk in chunks:
        for entry in tensor_entries(chunk).values():
            value = values.get(id(entry.data))
            if value is None:
                continue  # a buffer
            if isinstance(entry, ShardedTensor):
                yield dataclasses.replace(entry, data=value, dtype=value.dtype)
            else:
                yield from shards_of(dataclasses.replace(entry, data=value))
