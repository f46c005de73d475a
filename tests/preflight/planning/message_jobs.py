"""Bytes of every collective that one training step calls, seen where torch dispatches them."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from layouts import random_batches
from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megapoly.config import Config
from megapoly.platform.device import select_platform
from megapoly.training.distributed import process_groups
from megapoly.training.state import build_state
from megapoly.training.step import run_microbatches

# The operators of torch, what the plan calls them, and which of their arguments has the bytes.
_OPERATORS = {
    "allreduce_": ("all-reduce", 0),
    "_allgather_base_": ("all-gather", 0),
    "allgather_": ("all-gather", 0),
    "_reduce_scatter_base_": ("reduce-scatter", 1),
    "reduce_scatter_": ("reduce-scatter", 1),
    # Of buckets of gradients.
    "allreduce_coalesced_": ("all-reduce", 0),
    "reduce_scatter_tensor_coalesced_": ("reduce-scatter", 1),
    "allgather_into_tensor_coalesced_": ("all-gather", 0),
    "alltoall_base_": ("all-to-all", 1),
    "send": ("send", 0),
}


class _Counter(TorchDispatchMode):
    """Adds up bytes by kind, of groups of more than one rank."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "megapoly":  # its kernels call collectives, too
            with self:
                key = torch.DispatchKey.CompositeExplicitAutograd
                return func._op_dk(key, *args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.namespace == "c10d" and name in _OPERATORS:
            kind, place = _OPERATORS[name]
            group = next(a for a in args if isinstance(a, torch.ScriptObject) and _is_group(a))
            if dist.ProcessGroup.unbox(group).size() > 1:
                self.bytes[kind] += sum(t.nbytes for t in _tensors(args[place]))
        return func(*args, **(kwargs or {}))


def _is_group(value: Any) -> bool:
    return "ProcessGroup" in str(value._type())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    else:
        for item in value:
            yield from _tensors(item)


def messages_of_rank(configs: dict[str, Config]) -> dict[str, dict[str, int]]:
    """Bytes that this rank's calls of one step are about, by kind, of each model."""
    platform = select_platform("cpu")
    counted = {}
    with process_groups(next(iter(configs.values())), platform):
        for name, config in configs.items():
            get_moe_layer_wise_logging_tracker().clear()
            state = build_state(config, platform, corpus=None)
            for chunk in state.chunks:
                chunk.zero_grad_buffer()
            with _Counter() as counter:
                batches = random_batches(config, state.layout)
                run_microbatches(state, batches, state.layout.num_microbatches, forward_only=False)
                state.optimizer.step()
            counted[name] = dict(counter.bytes)
    return counted
