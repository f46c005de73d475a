"""Weights and gradients of the whole model, assembled from the shards of all ranks.

Shards have the names and places of checkpoints, which are the same at every layout.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megapoly.model.builder import unwrap
from megapoly.model.shards import parameter_shards

_VOCABULARY_ROWS = ("embedding.word_embeddings.weight", "output_layer.weight")


@dataclasses.dataclass
class ParameterShard:
    """The part of a parameter, or of its gradient, that one rank holds.

    Args:
        name: name of the parameter in a checkpoint.
        place: index of the shard in the whole tensor.
        whole_shape: shape of the whole tensor.
        data: the shard.
    """

    name: str
    place: tuple[slice | int, ...]
    whole_shape: tuple[int, ...]
    data: Tensor


def weight_shards(chunks: Iterable[DistributedDataParallel]) -> list[ParameterShard]:
    """Return the shards of this rank's weights."""
    chunks = list(chunks)
    values = {id(p): p.data.clone() for chunk in chunks for p in chunk.parameters()}
    return _shards(chunks, values)


def gradient_shards(chunks: Iterable[DistributedDataParallel]) -> list[ParameterShard]:
    """Return the shards of this rank's gradients, reduced over all ranks, fp32; collective."""
    chunks = list(chunks)
    if chunks[0].ddp_config.use_distributed_optimizer:
        _gather_shards(chunks)
    values = {id(p): p.main_grad.clone() for chunk in chunks for p in chunk.parameters()}
    return _shards(chunks, values)


@dataclasses.dataclass
class WholeTensors:
    """Tensors of the whole model.

    Args:
        tensors: by name, fp32; NaN where no rank holds a shard.
        disagreements: by name, how much ranks differ that hold the same shard, relative to its
            norm; without those that agree to the bit.
    """

    tensors: dict[str, Tensor]
    disagreements: dict[str, float]


def assemble(shards: Iterable[ParameterShard]) -> WholeTensors:
    """Assemble the shards of all ranks; if several differ, the first counts."""
    result = WholeTensors({}, {})
    for shard in shards:
        tensor = result.tensors.setdefault(shard.name, torch.full(shard.whole_shape, math.nan))
        data, present = shard.data.float(), tensor[shard.place]
        if present.isnan().all():
            tensor[shard.place] = data
        elif not torch.equal(present, data):
            difference = ((present - data).norm() / present.norm()).item()
            known = result.disagreements.get(shard.name, 0.0)
            result.disagreements[shard.name] = max(known, difference)
    return result


def without_padding(tensors: dict[str, Tensor], vocab_size: int) -> dict[str, Tensor]:
    """Cut embedding and output layer to the rows of tokens; padding may differ."""
    return {
        name: tensor[:vocab_size] if name in _VOCABULARY_ROWS else tensor
        for name, tensor in tensors.items()
    }


def _shards(
    chunks: Iterable[DistributedDataParallel], values: dict[int, Tensor]
) -> list[ParameterShard]:
    """Return the values of parameters (by identity) with their places in a checkpoint."""
    found = []
    for shard in parameter_shards(map(unwrap, chunks), values):
        axes = shard.prepend_axis_num  # layer and expert
        begins = zip(shard.global_offset[axes:], shard.local_shape, strict=True)
        place = (*shard.global_offset[:axes], *(slice(i, i + n) for i, n in begins))
        found.append(ParameterShard(shard.key, place, shard.global_shape, shard.data))
    return found


def _gather_shards(chunks: Iterable[DistributedDataParallel]) -> None:
    """Gather the gradients of which the distributed optimizer leaves a rank only its shard."""
    for buffer in [b for c in chunks for b in [*c.buffers, *c.expert_parallel_buffers]]:
        for bucket in buffer.buckets:
            group = buffer.data_parallel_group
            shard = bucket.grad_data.chunk(group.size())[group.rank()].clone()
            dist.all_gather_into_tensor(bucket.grad_data, shard, group=group)
