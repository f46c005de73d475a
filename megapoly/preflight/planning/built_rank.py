"""Build one rank's part of a model on the meta device and measure it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from megatron.core.dist_checkpointing.mapping import is_main_replica
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megapoly.config import Config
from megapoly.model.builder import build_model, unwrap
from megapoly.model.shards import parameter_shards
from megapoly.platform.device import Platform
from megapoly.training.optimizer import build_optimizer


@dataclass(frozen=True)
class ShardPlace:
    """The place of a shard in a weight.

    Args:
        key: name of the weight in a checkpoint.
        offset: where the shard begins in it, layer and expert first.
    """

    key: str
    offset: tuple[int, ...]


@dataclass
class BuiltRank:
    """What the engine built for one rank.

    Args:
        dense_parameters: parameters of attention, norms, embeddings, routers, dense FFNs and shared
            experts; their gradients are summed over the data-parallel ranks.
        expert_parameters: parameters of its experts.
        weight_bytes: buffers of the parameters, with their padding.
        gradient_bytes: buffers of the gradients, with their padding.
        optimizer_bytes: moments and fp32 copies of the parameters, of this rank.
        dense_optimizer_numbers: dense parameters for which the optimizer of each data-parallel rank
            keeps state; from the layout of the buffers.
        expert_optimizer_numbers: the same of experts, for each expert-data-parallel rank.
        bytes_per_optimizer_number: bytes of state for one parameter.
        saved: parameters that this rank would save, by their place: of all ranks that hold a shard
            one saves it.
        global_sizes: parameters in every weight of which this rank holds a shard.
    """

    dense_parameters: int
    expert_parameters: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    dense_optimizer_numbers: np.ndarray
    expert_optimizer_numbers: np.ndarray
    bytes_per_optimizer_number: int
    saved: dict[ShardPlace, int] = field(repr=False)
    global_sizes: dict[str, int] = field(repr=False)


def build_rank(
    config: Config, platform: Platform
) -> tuple[BuiltRank, list[DistributedDataParallel]]:
    """Build model, gradient buffers and optimizer of the current rank, as in training.

    Args:
        config: resolved; the engine's process groups must exist.
        platform: the meta device.

    Returns:
        The measurements, and the model.
    """
    chunks = build_model(config, platform)
    saved, global_sizes = _saved(chunks)
    parameters = [p for chunk in chunks for p in chunk.parameters()]
    dense = sum(p.numel() for p in parameters if getattr(p, "allreduce", True))
    total = sum(p.numel() for p in parameters)
    gradients = [b.grad_data for c in chunks for b in c.buffers + c.expert_parallel_buffers]
    weights = _storages(parameters)
    state = _storages(_optimizer_tensors(config, chunks))
    counted = {
        name: _optimizer_numbers(config, chunks, name)
        for name in ("buffers", "expert_parallel_buffers")
    }
    built = BuiltRank(
        dense_parameters=dense,
        expert_parameters=total - dense,
        weight_bytes=sum(weights.values()),
        gradient_bytes=sum(_storages(gradients).values()),
        optimizer_bytes=sum(size for key, size in state.items() if key not in weights),
        dense_optimizer_numbers=counted["buffers"],
        expert_optimizer_numbers=counted["expert_parallel_buffers"],
        bytes_per_optimizer_number=4 * (3 if config.training.bf16 else 2),
        saved=saved,
        global_sizes=global_sizes,
    )
    return built, chunks


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Return the bytes of the tensors' storages, each once: many are views into one buffer."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage._cdata: storage.nbytes() for storage in storages}


def _optimizer_tensors(config: Config, chunks: list[DistributedDataParallel]) -> list[Tensor]:
    """Return the state that the first step makes, and the parameters that it updates."""
    optimizer = build_optimizer(config, chunks)
    tensors: list[Tensor] = []
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = part.optimizer
        if inner is None:
            continue  # a rank without parameters of this kind
        part.init_state_fn(inner)
        tensors += [p for group in inner.param_groups for p in group["params"]]
        tensors += [value for state in inner.state.values() for value in state.values()]
    return tensors


def _optimizer_numbers(
    config: Config, chunks: list[DistributedDataParallel], buffers: str
) -> np.ndarray:
    """Return the numbers of parameters that each rank's optimizer updates, [data-parallel ranks].

    The distributed optimizer splits every bucket evenly over the ranks, padding included, and keeps
    no state of padding (optimizer/distrib_optimizer.py:103).
    """
    found = [buffer for chunk in chunks for buffer in getattr(chunk, buffers)]
    num_ranks = found[0].data_parallel_world_size if found else 1
    if not config.parallel.use_distributed_optimizer:
        return np.full(num_ranks, sum(buffer.numel_unpadded for buffer in found))
    numbers = np.zeros(num_ranks, dtype=np.int64)
    for buffer in found:
        ends = np.array(sorted(buffer.param_index_map.values()))[:, :2]
        places = ends.ravel()  # where parameters begin and end in the buffer
        before = np.stack([np.zeros(len(ends)), ends[:, 1] - ends[:, 0]], axis=1).ravel().cumsum()
        for bucket in buffer.buckets:
            size = bucket.grad_data.numel()
            cuts = bucket.offset + np.arange(num_ranks + 1) * (size // num_ranks)
            numbers += np.diff(np.interp(cuts, places, before)).round().astype(np.int64)
    return numbers


def _saved(chunks: list[DistributedDataParallel]) -> tuple[dict[ShardPlace, int], dict[str, int]]:
    """Return what the rank would save of its parameters, and how large each whole weight is."""
    saved: dict[ShardPlace, int] = {}
    global_sizes: dict[str, int] = {}
    parameters = {id(p): p for chunk in chunks for p in chunk.parameters()}
    for shard in parameter_shards(map(unwrap, chunks), parameters):
        global_sizes[shard.key] = math.prod(shard.global_shape)
        if is_main_replica(shard.replica_id):
            place = ShardPlace(shard.key, tuple(shard.global_offset))
            saved[place] = saved.get(place, 0) + math.prod(shard.local_shape)
    return saved, global_sizes
