"""The shards of a model's parameters, as a checkpoint stores them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping

from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megapoly.model.builder import checkpoint_metadata, unwrap


def parameter_shards(
    chunks: Iterable[DistributedDataParallel], values: Mapping[int, Tensor]
) -> Iterator[ShardedTensor]:
    """Yield this rank's shard of every parameter; the two matrices of a gated FC1 separately.

    Args:
        chunks: the rank's model chunks.
        values: what the shards hold, such as weights or gradients, by the ``id`` of the parameter.
    """
    for chunk in chunks:
        for entry in unwrap(chunk).sharded_state_dict(metadata=checkpoint_metadata()).values():
            if not isinstance(entry, ShardedTensor | ShardedTensorFactory):
                continue
            if entry.data is None or id(entry.data) not in values:
                continue  # a buffer
            value = values[id(entry.data)]
            if isinstance(entry, ShardedTensor):
                yield dataclasses.replace(entry, data=value, dtype=value.dtype)
            else:
                yield from dataclasses.replace(entry, data=value).build()
