"""Weights and gradients of the whole model, put together from what every rank holds.

A rank's part of a tensor has its place from the checkpoint form of the model, in which names and
shapes are the same at every layout.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megapoly.model.builder import checkpoint_metadata, unwrap

_VOCABULARY_ROWS = ("embedding.word_embeddings.weight", "output_layer.weight")


@dataclasses.dataclass
class Part:
    """What one rank holds of a tensor of the whole model.

    Args:
        name: of the tensor in a checkpoint.
        place: index of the part in the whole.
        whole_shape: shape of the whole.
        data: the part.
    """

    name: str
    place: tuple[slice | int, ...]
    whole_shape: tuple[int, ...]
    data: Tensor


def weight_parts(chunks: Iterable[DistributedDataParallel]) -> list[Part]:
    """This rank's weights."""
    chunks = list(chunks)
    values = {id(p): p.data.clone() for chunk in chunks for p in chunk.parameters()}
    return list(_parts(chunks, values))


def gradient_parts(chunks: Iterable[DistributedDataParallel]) -> list[Part]:
    """This rank's gradients, reduced over all ranks, fp32; collective."""
    chunks = list(chunks)
    if chunks[0].ddp_config.use_distributed_optimizer:
        _gather_shards(chunks)
    values = {id(p): p.main_grad.clone() for chunk in chunks for p in chunk.parameters()}
    return list(_parts(chunks, values))


@dataclasses.dataclass
class Whole:
    """Tensors of the whole model.

    Args:
        tensors: by name, fp32; not a number where no rank holds a part.
        disagreements: where ranks that hold the same part differ in a bit: by name, how much of the
            part's norm.
    """

    tensors: dict[str, Tensor]
    disagreements: dict[str, float]


def whole(parts: Iterable[Part]) -> Whole:
    """Put together the parts of all ranks; of several that differ, the first counts."""
    result = Whole({}, {})
    for part in parts:
        tensor = result.tensors.setdefault(part.name, torch.full(part.whole_shape, math.nan))
        data, present = part.data.float(), tensor[part.place]
        if present.isnan().all():
            tensor[part.place] = data
        elif not torch.equal(present, data):
            difference = ((present - data).norm() / present.norm()).item()
            known = result.disagreements.get(part.name, 0.0)
            result.disagreements[part.name] = max(known, difference)
    return result


def without_padding(tensors: dict[str, Tensor], vocab_size: int) -> dict[str, Tensor]:
    """Cut embedding and output layer to the rows that stand for tokens; padding may differ."""
    return {
        name: tensor[:vocab_size] if name in _VOCABULARY_ROWS else tensor
        for name, tensor in tensors.items()
    }


def _parts(chunks: Iterable[DistributedDataParallel], values: dict[int, Tensor]) -> Iterator[Part]:
    """The values of parameters (by identity) with their places in a checkpoint."""
    entries = [
        entry
        for chunk in chunks
        for entry in unwrap(chunk).sharded_state_dict(metadata=checkpoint_metadata()).values()
    ]
    for entry in entries:
        if not isinstance(entry, ShardedTensor | ShardedTensorFactory):
            continue
        if entry.data is None or id(entry.data) not in values:
            continue  # a buffer
        value = values[id(entry.data)]
        for shard in _shards(entry, value):
            axes = shard.prepend_axis_num  # layer and expert
            begins = zip(shard.global_offset[axes:], shard.local_shape, strict=True)
            place = (*shard.global_offset[:axes], *(slice(i, i + n) for i, n in begins))
            yield Part(shard.key, place, shard.global_shape, shard.data)


def _shards(entry: ShardedTensor | ShardedTensorFactory, value: Tensor) -> list[ShardedTensor]:
    """The value in the place of a parameter, or of the parts that are saved by themselves."""
    if isinstance(entry, ShardedTensor):
        return [dataclasses.replace(entry, data=value, dtype=value.dtype)]
    return list(dataclasses.replace(entry, data=value).build())


def _gather_shards(chunks: Iterable[DistributedDataParallel]) -> None:
    """The distributed optimizer leaves a rank only its shard of the sum: fetch the others."""
    for buffer in [b for c in chunks for b in [*c.buffers, *c.expert_parallel_buffers]]:
        for bucket in buffer.buckets:
            group = buffer.data_parallel_group
            shard = bucket.grad_data.chunk(group.size())[group.rank()].clone()
            dist.all_gather_into_tensor(bucket.grad_data, shard, group=group)
