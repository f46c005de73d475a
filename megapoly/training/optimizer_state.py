"""Optimizer state in checkpoints: one format for every optimizer, precision and layout.

Next to a parameter of the model, the checkpoint's tensor NAME, there are

    optimizer.state.exp_avg.NAME, optimizer.state.exp_avg_sq.NAME    moments, fp32
    optimizer.state.fp32_param.NAME                                  master weight, of bf16 models

with the same shape; Adam's step is one number. Each rank stores what it holds: its shard of the
parameter or, with the distributed optimizer, a range of that, see
:mod:`megapoly.training.range_shards`.
The engine's own formats differ between its three optimizers (optimizer/optimizer.py,
optimizer/distrib_optimizer.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import (
    ChainedOptimizer,
    DistributedOptimizer,
    Float16OptimizerWithFloat16Params,
    MegatronOptimizer,
)
from torch import Tensor

from megapoly.training.range_shards import range_shards

_PREFIX = "optimizer.state"
_MOMENTS = ("exp_avg", "exp_avg_sq")
_MASTER = "fp32_param"

Entry: TypeAlias = ShardedTensor | ShardedTensorFactory
# The tensors above of each parameter, by their short names, in the order of its optimizer.
ParameterStates = list[dict[str, Any]]


def state_to_save(optimizer: MegatronOptimizer, model_state: dict[str, Any]) -> dict[str, Any]:
    """Return the optimizer state that a checkpoint has; views of the optimizer's own tensors.

    Args:
        optimizer: of the engine, after a step.
        model_state: sharded state of the model, whose entries hold the parameters themselves.
    """
    parts = list(_parts(optimizer))
    return {
        "step": max(group.get("step", 0) for part in parts for group in part.param_groups),
        "parameters": [_states_of_part(part, model_state) for part in parts],
    }


def state_to_load(
    optimizer: MegatronOptimizer, model_state: dict[str, Any], *, saved_in_bf16: bool
) -> dict[str, Any]:
    """Return the entries of a checkpoint to load: moments and every parameter's fp32 value.

    Of the distributed optimizer these are the elements that it holds on this rank, and no others.

    Args:
        optimizer: of the engine.
        model_state: sharded state of the model, whose entries hold the parameters themselves.
        saved_in_bf16: the checkpoint has master weights; otherwise its weights are fp32.
    """
    entries = _entries(model_state)
    prefixes = {name: f"{_PREFIX}.{name}." for name in (*_MOMENTS, _MASTER)}
    if not saved_in_bf16:
        prefixes[_MASTER] = ""

    def places(parameter: Tensor, elements: range | None) -> dict[str, Any]:
        # Rows that pad the vocabulary beyond the checkpoint's are not read and stay zero. On CPU:
        # the optimizer's own tensors may be on a device, and some of them are not there yet.
        shape = parameter.shape if elements is None else (len(elements),)
        return {
            name: _entry(
                entries[id(parameter)],
                elements,
                torch.zeros(shape, dtype=torch.float32, device="cpu"),
                prefix,
            )
            for name, prefix in prefixes.items()
        }

    return {
        "step": 0,
        "parameters": [
            [places(parameter, elements) for parameter, elements in _held(part)]
            for part in _parts(optimizer)
        ],
    }


@torch.no_grad()
def load_state(optimizer: MegatronOptimizer, loaded: dict[str, Any]) -> None:
    """Copy a loaded :func:`state_to_load` into optimizer and model; collective."""
    chunks: dict[int, Any] = {}
    for part, states in zip(_parts(optimizer), loaded["parameters"], strict=True):
        if isinstance(part, DistributedOptimizer):
            _load_distributed(part, states)
            chunks |= {id(chunk): chunk for chunk in part.model_chunks}
        else:
            for parameter, state in zip(_parameters(part), states, strict=True):
                parameter.copy_(state[_MASTER])
            for master, state in zip(_masters(part), states, strict=True):
                master.copy_(state[_MASTER])
                part.optimizer.state[master] = {
                    name: state[name].to(master.device) for name in _MOMENTS
                }
        for group in part.param_groups:
            group["step"] = loaded["step"]
    for chunk in chunks.values():  # every rank has its elements of the parameters alone
        chunk.start_param_sync(force_sync=True)


def _load_distributed(part: DistributedOptimizer, states: ParameterStates) -> None:
    part.load_state_dict(part.state_dict())  # allocates
    for (parameter, _), state in zip(_held(part), states, strict=True):
        # Some parameters have several shards here, in the order of their elements.
        flat = {name: torch.cat([s.flatten() for s in shards]) for name, shards in state.items()}
        flat["param"] = flat.pop(_MASTER)
        part._set_main_param_and_optimizer_states(parameter, flat)
    part._copy_main_params_to_model_params()


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


def _held(part: MegatronOptimizer) -> Iterator[tuple[Tensor, range | None]]:
    """Yield each parameter of which this rank holds the state, and the flat elements that it holds.

    None: all. The distributed optimizer holds a range of some parameters.
    """
    if not isinstance(part, DistributedOptimizer):
        for parameter in _parameters(part):
            yield parameter, None
        return
    for of_buffer in part.gbuf_ranges:
        for of_buckets in of_buffer.values():
            for of_bucket in of_buckets:
                for parameter, ranges in of_bucket["param_map"].items():
                    yield parameter, range(ranges["param"].start, ranges["param"].end)


def _states_of_part(part: MegatronOptimizer, model_state: dict[str, Any]) -> ParameterStates:
    entries, names = _entries(model_state), [*_MOMENTS]
    if part.config.bf16:
        names.append(_MASTER)
    return [
        {
            name: _entry(entries[id(parameter)], elements, tensors[name], f"{_PREFIX}.{name}.")
            for name in names
        }
        for (parameter, elements), tensors in zip(_held(part), _tensors(part), strict=True)
    ]


def _tensors(part: MegatronOptimizer) -> Iterator[dict[str, Tensor]]:
    """Yield moments and master weight of each parameter, in the order of :func:`_held`."""
    if isinstance(part, DistributedOptimizer):
        for parameter, _ in _held(part):
            tensors = part._get_main_param_and_optimizer_states(parameter)
            yield {_MASTER: tensors.pop("param"), **tensors}
        return
    for master in _masters(part):
        yield {_MASTER: master, **part.optimizer.state[master]}


def _entry(
    entry: Entry, elements: range | None, values: Tensor, prefix: str
) -> Entry | list[ShardedTensor]:
    """Return what stores values of a parameter, whose entry in the model's state is given."""
    if elements is not None:
        return range_shards(entry, elements.start, values, prefix)
    key = f"{prefix}{entry.key}"
    if isinstance(entry, ShardedTensorFactory):
        return dataclasses.replace(entry, key=key, data=values)
    return dataclasses.replace(entry, key=key, data=values, dtype=values.dtype)


def _entries(model_state: dict[str, Any]) -> dict[int, Entry]:
    """Return the entries of a model's sharded state by the ``id`` of their parameters."""
    return {
        id(entry.data): entry
        for entry in nested_values(model_state)
        if isinstance(entry, ShardedTensor | ShardedTensorFactory)
    }
