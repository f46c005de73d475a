"""Set the initial weights of a model: each rank takes its part of :mod:`.initial_values`."""

from __future__ import annotations

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.transformer.module import MegatronModule

from megapoly.config import ModelConfig
from megapoly.model.initial_values import initial_value
from megapoly.model.shards import shards_of, tensor_entries

# Coefficients, which FFNActivation sets and marks. Those of experts are split over expert-parallel
# ranks, not over tensor-parallel ranks.
_SET_ELSEWHERE = ".activation_func."


@torch.no_grad()
def initialize_weights(chunk: MegatronModule, model: ModelConfig, seed: int) -> None:
    """Set every parameter of a model chunk, in place, and mark those that are split over ranks.

    Matrices are normal with ``init_method_std`` (``truncated_normal``: truncated at 3 std), which
    is divided by sqrt(2 num_layers) for those that write to the residual stream if
    ``scale_residual_init`` is set. Norm weights are one and rows that pad the vocabulary are zero.
    Activation coefficients keep the registry's values. On the meta device parameters are only
    marked.

    Args:
        chunk: the model, or the part of it on this pipeline stage.
        model: distribution and std.
        seed: seed of the run.
    """
    missed = {id(p): name for name, p in chunk.named_parameters()}
    for entry in tensor_entries(chunk).values():
        if missed.pop(id(entry.data), None) is None or _SET_ELSEWHERE in entry.key:
            continue  # a buffer, or set elsewhere
        for shard in shards_of(entry):
            if not shard.data.is_meta:
                _fill(shard, model, seed)
            if shard.local_shape != shard.global_shape[shard.prepend_axis_num :]:
                # The engine marks these only where it sets weights itself
                # (tensor_parallel/layers.py:130); the gradient norm counts unmarked parameters on
                # the first tensor-parallel rank alone.
                entry.data.tensor_model_parallel = True
    # With tied embeddings the output layer is another name for the input's weight.
    assert not missed, f"parameters without a place in the checkpoint: {sorted(missed.values())}"


def _fill(shard: ShardedTensor, model: ModelConfig, seed: int) -> None:
    axes = shard.prepend_axis_num  # layer and expert
    target = shard.data
    # The engine sets this for weights that it pads along the vocabulary.
    rows = model.vocab_size if shard.allow_shape_mismatch else None
    full = initial_value(
        shard.key,
        shard.global_offset[:axes],
        shard.global_shape[axes:],
        model,
        seed,
        num_rows=rows,
    )
    for axis, (start, length) in enumerate(
        zip(shard.global_offset[axes:], target.shape, strict=True)
    ):
        full = full.narrow(axis, start, length)
    target.copy_(full)
