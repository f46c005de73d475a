"""Scalars from inside the model: load of the experts, coefficients of the activations."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megapoly.model.builder import decoder_layers
from megapoly.model.ffn_activation import FFNActivation
from megapoly.training.state import TrainState, gathered_parameters


class ExpertLoad:
    """Counts the tokens that each expert of each layer gets in training.

    Args:
        state: the run; it counts nothing in a dense model.
    """

    def __init__(self, state: TrainState) -> None:
        model = state.config.model
        self._num_experts = model.num_moe_experts or 0
        self._counts = torch.zeros(
            model.num_layers, self._num_experts, dtype=torch.int64, device=state.platform.device
        )
        if self._num_experts:
            for layer in decoder_layers(state.chunks):
                layer.mlp.router.register_forward_hook(self._count)

    def _count(self, router: Any, inputs: Any, outputs: tuple[Tensor, Tensor]) -> None:
        if router.training:
            routing_map = outputs[1]  # [tokens, experts]
            self._counts[router.layer_number - 1] += routing_map.sum(0)

    def collect(self) -> dict[str, float]:
        """Return scalars since the last call, on every rank; collective.

        Returns:
            For each layer ``expert_load/layer_00/max_over_mean`` (1: balanced) and
            ``expert_load/layer_00/idle_fraction`` (experts without a token).
        """
        if not self._num_experts:
            return {}
        dist.all_reduce(self._counts)
        counts = self._counts.double().cpu()
        self._counts.zero_()
        scalars = {}
        for layer, load in enumerate(counts):
            tag = f"expert_load/layer_{layer:02d}"
            scalars[f"{tag}/max_over_mean"] = (load.max() / load.mean().clamp_min(1e-30)).item()
            scalars[f"{tag}/idle_fraction"] = (load == 0).double().mean().item()
        return scalars


def activation_coefficients(state: TrainState) -> dict[str, float]:
    """Return the learned coefficients of all activations on rank 0, nothing elsewhere; collective.

    Returns:
        ``activation/layer_00/ffn/a0`` and so on. MoE layers have ``experts`` or
        ``shared_experts`` instead of ``ffn``, and ``experts/expert_03`` if each expert has its own
        coefficients. The slope of a PolyPReLU is ``slope``.
    """
    local: dict[str, float] = {}
    with gathered_parameters(state):
        for layer in decoder_layers(state.chunks):
            for name, module in layer.named_modules():
                if isinstance(module, FFNActivation):
                    local |= _coefficients(
                        f"activation/layer_{layer.layer_number - 1:02d}", name, module
                    )
    gathered = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(local, gathered)
    merged: dict[str, float] = {}
    for part in gathered or []:
        merged |= part or {}
    return dict(sorted(merged.items()))


def _coefficients(layer_tag: str, name: str, module: FFNActivation) -> dict[str, float]:
    kind = kind_of_ffn(name, module)
    scalars = {}
    for parameter_name in module.coefficient_names:
        value = getattr(module, parameter_name).detach().float().cpu()
        rows = value if module.per_expert else value[None]
        first = parallel_state.get_expert_model_parallel_rank() * len(rows)
        for i, row in enumerate(rows.tolist()):
            expert = f"/expert_{first + i:02d}" if module.per_expert else ""
            for k, number in enumerate(row):
                leaf = f"a{k}" if parameter_name == "coefficients" else parameter_name
                scalars[f"{layer_tag}/{kind}{expert}/{leaf}"] = number
    return scalars


def kind_of_ffn(name: str, module: FFNActivation) -> str:
    """Return what the activation belongs to: ``ffn``, ``experts`` or ``shared_experts``.

    Args:
        name: of the module within its layer.
        module: the activation.
    """
    if "shared_experts" in name:
        return "shared_experts"
    return "experts" if module.is_expert else "ffn"
