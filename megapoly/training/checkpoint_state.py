"""What a checkpoint has of a run, on one rank: the entries that saving and loading share."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedObject

from megapoly.config import Config
from megapoly.config.resolve import sequence_parts
from megapoly.model.builder import unwrap
from megapoly.model.shards import checkpoint_metadata
from megapoly.training.random_state import random_state
from megapoly.training.state import ModelState, TrainState


def model_state(state: ModelState, *, with_scales: bool) -> dict[str, Any]:
    """Return the entries of each chunk of a stage; each chunk numbers its layers from 0.

    Besides weights the engine's modules have ``_extra_state``. It is empty except for FP8 and
    differs between families of layers. Without it, a checkpoint loads with and without
    Transformer Engine.

    Args:
        state: a run, or a model alone.
        with_scales: keep ``_extra_state``, for the history of FP8's scaling factors.
    """
    metadata = checkpoint_metadata()
    entries = {
        str(i): unwrap(chunk).sharded_state_dict(metadata=metadata)
        for i, chunk in enumerate(state.chunks)
    }
    return {
        chunk: {
            name: entry
            for name, entry in of_chunk.items()
            if with_scales or not isinstance(entry, ShardedObject)
        }
        for chunk, of_chunk in entries.items()
    }


def scales_have_history(config: Config) -> bool:
    """Return whether FP8 scales by earlier steps; other recipes have no history."""
    return config.training.fp8 is not None and config.training.fp8_recipe == "delayed"


def random_state_entry(state: TrainState) -> ShardedObject:
    """Return the entry of this rank's random state."""
    return ShardedObject(
        "random_state",
        random_state(state.platform),
        global_shape=(dist.get_world_size(),),
        global_offset=(dist.get_rank(),),
    )


def generators(state: TrainState) -> dict[str, str]:
    """Return what a random state fits: devices have other generators, and replicas other seeds."""
    return {"device": state.platform.device.type, "seeds": "one for each replica"}


def layout(config: Config) -> dict[str, int]:
    """Return the layout, by which ranks find their own random states."""
    parallel = config.parallel
    return {
        "world_size": dist.get_world_size(),
        "tensor": parallel.tensor_model_parallel_size,
        "pipeline": parallel.pipeline_model_parallel_size,
        "virtual_pipeline": parallel.virtual_pipeline_model_parallel_size or 1,
        "context": parallel.context_parallel_size,
        "sequence": sequence_parts(parallel),
        "expert": parallel.expert_model_parallel_size,
        "expert_tensor": parallel.expert_tensor_parallel_size or 1,
    }
