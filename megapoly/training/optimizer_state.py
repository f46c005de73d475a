"""Optimizer state in checkpoints: one format for every optimizer, precision and layout.

Next to a parameter of the model, the checkpoint's tensor NAME, there are

    optimizer.state.exp_avg.NAME, optimizer.state.exp_avg_sq.NAME    moments, fp32
    optimizer.state.fp32_param.NAME                                  master weight, of bf16 models

with the same shape and sharding; Adam's step is one number. The engine's own formats differ
between its three optimizers (optimizer/optimizer.py, optimizer/distrib_optimizer.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.optimizer import (
    ChainedOptimizer,
    DistributedOptimizer,
    Float16OptimizerWithFloat16Params,
    MegatronOptimizer,
)
from torch import Tensor

_PREFIX = "optimizer.state"
_MOMENTS = ("exp_avg", "exp_avg_sq")
_MASTER = "fp32_param"

Entry: TypeAlias = ShardedTensor | ShardedTensorFactory
# The tensors above of each parameter, by their short names, in the order of its optimizer.
ParameterStates = list[dict[str, Any]]


def state_to_save(
    optimizer: MegatronOptimizer, model_state: dict[str, Any], metadata: dict[str, Any]
) -> dict[str, Any]:
    """Return the optimizer state that a checkpoint has; collective.

    Args:
        optimizer: of the engine, after a step.
        model_state: sharded state of the model, whose entries hold the parameters themselves.
        metadata: what the engine needs to know about the layout.
    """
    parts = list(_parts(optimizer))
    return {
        "step": max(group.get("step", 0) for part in parts for group in part.param_groups),
        "parameters": [_states_of_part(part, model_state, metadata) for part in parts],
    }


def state_to_load(
    optimizer: MegatronOptimizer, model_state: dict[str, Any], *, saved_in_bf16: bool
) -> dict[str, Any]:
    """Return the entries of a checkpoint to load: moments and every parameter's fp32 value.

    Args:
        optimizer: of the engine.
        model_state: sharded state of the model, whose entries hold the parameters themselves.
        saved_in_bf16: the checkpoint has master weights; otherwise its weights are fp32.
    """
    entries = _entries(model_state)

    def place(parameter: Tensor, prefix: str) -> Entry:
        # Rows that pad the vocabulary beyond the checkpoint's are not read and stay zero. On CPU: a
        # rank may use only a shard of what it reads.
        zeros = torch.zeros(parameter.shape, dtype=torch.float32, device="cpu")
        entry = make_sharded_optimizer_tensor(entries[id(parameter)], zeros, prefix)
        if not prefix:
            entry.key = entries[id(parameter)].key
        return entry

    def places(parameter: Tensor) -> dict[str, Entry]:
        moments = {name: place(parameter, f"{_PREFIX}.{name}") for name in _MOMENTS}
        master = place(parameter, f"{_PREFIX}.{_MASTER}" if saved_in_bf16 else "")
        return {**moments, _MASTER: master}

    return {
        "step": 0,
        "parameters": [
            [places(parameter) for parameter in _parameters(part)] for part in _parts(optimizer)
        ],
    }


@torch.no_grad()
def load_state(optimizer: MegatronOptimizer, loaded: dict[str, Any]) -> None:
    """Copy a loaded :func:`state_to_load` into the optimizer and the model's parameters."""
    for part, states in zip(_parts(optimizer), loaded["parameters"], strict=True):
        for parameter, state in zip(_parameters(part), states, strict=True):
            parameter.copy_(state[_MASTER])
        if isinstance(part, DistributedOptimizer):
            part.load_state_dict(part.state_dict())  # allocates
            part.load_parameter_state_from_fully_reshardable(dict(enumerate(states)))
        else:
            for master, state in zip(_masters(part), states, strict=True):
                master.copy_(state[_MASTER])
                part.optimizer.state[master] = {
                    name: state[name].to(master.device) for name in _MOMENTS
                }
        for group in part.param_groups:
            group["step"] = loaded["step"]


def without_parameters(model_state: dict[str, Any], optimizer: MegatronOptimizer) -> dict[str, Any]:
    """Return the entries of a chunk's sharded state that :func:`state_to_load` does not read."""
    loaded = {id(p) for part in _parts(optimizer) for p in _parameters(part)}
    return {
        name: entry
        for name, entry in model_state.items()
        if id(getattr(entry, "data", None)) not in loaded
    }


def _parts(optimizer: MegatronOptimizer) -> Iterator[MegatronOptimizer]:
    """Yield the optimizers that have parameters: of dense layers and of experts."""
    chained = isinstance(optimizer, ChainedOptimizer)
    for part in optimizer.chained_optimizers if chained else [optimizer]:
        if not part.is_stub_optimizer:
            yield part


def _parameters(part: MegatronOptimizer) -> list[Tensor]:
    """Return the model's parameters of one optimizer, in the order of its states."""
    if isinstance(part, DistributedOptimizer):
        return [parameter for buffer in part.buffers for parameter in buffer.param_index_map]
    if isinstance(part, Float16OptimizerWithFloat16Params):
        groups = zip(part.float16_groups, part.fp32_from_fp32_groups, strict=True)
        return [parameter for pair in groups for group in pair for parameter in group]
    return _masters(part)


def _masters(part: MegatronOptimizer) -> list[Tensor]:
    """Return the fp32 tensors that Adam updates, in the order of :func:`_parameters`."""
    if isinstance(part, Float16OptimizerWithFloat16Params):
        groups = zip(part.fp32_from_float16_groups, part.fp32_from_fp32_groups, strict=True)
        return [master for pair in groups for group in pair for master in group]
    return part.get_parameters()


def _states_of_part(
    part: MegatronOptimizer, model_state: dict[str, Any], metadata: dict[str, Any]
) -> ParameterStates:
    if isinstance(part, DistributedOptimizer):
        # Gathers the shards of all data-parallel ranks.
        gathered = part.sharded_param_state_fully_reshardable(model_state, False, metadata)
        return [_renamed(states, part.config.bf16) for states in gathered.values()]
    entries = _entries(model_state)
    states = []
    for parameter, master in zip(_parameters(part), _masters(part), strict=True):
        tensors = {name: part.optimizer.state[master][name] for name in _MOMENTS}
        if part.config.bf16:
            tensors[_MASTER] = master
        states.append(
            {
                name: make_sharded_optimizer_tensor(
                    entries[id(parameter)], tensor, f"{_PREFIX}.{name}"
                )
                for name, tensor in tensors.items()
            }
        )
    return states


def _renamed(states: dict[str, Entry], bf16: bool) -> dict[str, Entry]:
    """Rename the distributed optimizer's ``param`` to the name of the master weight."""
    master = states.pop("param")
    if bf16:
        master.key = master.key.replace(f"{_PREFIX}.param.", f"{_PREFIX}.{_MASTER}.", 1)
        states[_MASTER] = master
    return states


def _entries(model_state: dict[str, Any]) -> dict[int, Entry]:
    """Return the entries of a model's sharded state by the ``id`` of their parameters."""
    return {
        id(entry.data): entry
        for entry in nested_values(model_state)
        if isinstance(entry, ShardedTensor | ShardedTensorFactory)
    }
