"""Most bytes that autograd keeps at once in a training step, seen where it saves and frees them."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker
from message_jobs import batches_of
from torch import Tensor

from megapoly.config import Config
from megapoly.platform import select_platform
from megapoly.training.distributed import process_groups
from megapoly.training.state import build_state
from megapoly.training.step import run_microbatches

# torch's RMSNorm keeps other tensors on CPU than on a GPU.
NORMS = ("input_layernorm", "pre_mlp_layernorm", "final_layernorm")


class _Kept:
    """What autograd holds in place of a tensor; it lets go of it with the node of the graph."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class _Peak:
    """Bytes of all storages that something holds, parameters and norms aside."""

    def __init__(self, parameters: set[int], modules: list[str]) -> None:
        self.bytes = 0
        self._now, self._holders = 0, {}  # by the storage's address
        self._parameters, self._modules = parameters, modules

    def pack(self, tensor: Tensor) -> _Kept:
        kept, storage = _Kept(tensor), tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        is_norm = bool(self._modules) and self._modules[-1].endswith(NORMS)
        if not is_norm and address not in self._parameters:
            self._now += 0 if self._holders.get(address) else size
            self._holders[address] = self._holders.get(address, 0) + 1
            weakref.finalize(kept, self._free, address, size)
            self.bytes = max(self.bytes, self._now)
        return kept

    def _free(self, address: int, size: int) -> None:
        self._holders[address] -= 1
        self._now -= 0 if self._holders[address] else size


def kept_by_rank(configs: dict[str, Config]) -> dict[str, int]:
    """Bytes that this rank keeps at the fullest moment of a step of each model."""
    platform, found = select_platform("cpu"), {}
    with process_groups(next(iter(configs.values())), platform):
        for name, config in configs.items():
            get_moe_layer_wise_logging_tracker().clear()
            state = build_state(config, platform, corpus=None)
            parameters: set[int] = set()
            inside: list[str] = []
            for chunk in state.chunks:
                chunk.zero_grad_buffer()
                parameters |= {p.untyped_storage().data_ptr() for p in chunk.parameters()}
                for module_name, module in chunk.named_modules():
                    _follow(module, module_name, inside)
            peak, layout = _Peak(parameters, inside), state.layout
            with torch.autograd.graph.saved_tensors_hooks(peak.pack, lambda kept: kept.tensor):
                batches = batches_of(config, layout)
                run_microbatches(state, batches, layout.num_microbatches, forward_only=False)
            found[name] = peak.bytes
    return found


def _follow(module: torch.nn.Module, name: str, inside: list[str]) -> None:
    def enter(*args: Any) -> None:
        inside.append(name)

    def leave(*args: Any) -> None:
        inside.pop()

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave)
