"""Routed experts of a layer, whose activation gets the expert and the probability of each row.

Both forms have the same weights, initial values and checkpoints: ``linear_fc1.weight`` and
``linear_fc2.weight`` with a leading expert axis, and the activation's coefficients.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class _RoutedExperts(MegatronModule):
    """Constructor of both forms: the engine's linear maps around one activation for all experts.

    Args:
        num_local_experts: experts on this rank.
        config: the engine's configuration.
        submodules: linear maps, the engine's or Transformer Engine's, and activation.
        pg_collection: process groups of the experts.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        linears = dataclasses.replace(submodules, activation_func=None)
        super().__init__(num_local_experts, config, linears, pg_collection)
        _mark_expert_weights(self)
        self.activation_func = build_module(
            submodules.activation_func, config=config, num_local_experts=num_local_experts
        )


class GroupedExperts(_RoutedExperts, TEGroupedMLP):
    """FC1, activation times router probability, FC2, on rows sorted by expert.

    Source: the engine's ``TEGroupedMLP`` (transformer/moe/experts.py:512), whose linear maps come
    from the spec: Transformer Engine's or those of :mod:`megapoly.model.grouped_linear`. This class
    replaces its forward, in which the activation gets neither the router probability nor the number
    of tokens of each expert and cannot have coefficients per expert.
    """

    def forward(
        self,
        permuted_local_hidden_states: Tensor,
        tokens_per_expert: Tensor,
        permuted_probs: Tensor,
    ) -> tuple[Tensor, None]:
        """Apply the experts to rows sorted by expert: [rows, h] -> [rows, h].

        For FP8 the rows of each expert are padded to a multiple with rows of zeros and probability
        0. The activation makes them zero again, and their gradients are zero: they add nothing to
        the gradient of a weight or a coefficient.

        Args:
            permuted_local_hidden_states: [rows, h].
            tokens_per_expert: [num_local_experts] rows of each expert.
            permuted_probs: [rows] router probability of each row.
        """
        hidden_states, probs = permuted_local_hidden_states, permuted_probs
        rows = splits = tokens_per_expert.tolist()
        if self.config.fp8:
            hidden_states, splits = self.quantization_padding(hidden_states, rows)
            probs = self.quantization_padding(probs.unsqueeze(-1), rows)[0].squeeze(-1)
            tokens_per_expert = torch.tensor(splits)
        intermediate, _ = self.linear_fc1(hidden_states, splits)
        intermediate = self.activation_func(
            intermediate, probs=probs, tokens_per_expert=tokens_per_expert
        )
        output, _ = self.linear_fc2(intermediate, splits)
        if self.config.fp8:
            output = self.quantization_unpadding(output, rows)
        return output, None


class SequentialExperts(_RoutedExperts, SequentialMLP):
    """FC1, activation times router probability, FC2, one expert after another.

    Source: the engine's ``SequentialMLP`` (transformer/moe/experts.py:820), which has an ``MLP``
    per expert. Only their linear maps are used: each ``MLP`` would have its own activation, while
    all experts of a layer may share one coefficient set, and would multiply by the router
    probability after the activation, not in it.
    """

    def forward(
        self,
        permuted_local_hidden_states: Tensor,
        tokens_per_expert: Tensor,
        permuted_probs: Tensor,
    ) -> tuple[Tensor, None]:
        """Apply the experts to rows sorted by expert: [rows, h] -> [rows, h].

        An expert without rows also runs: its gradients are zeros, and the ranks that share it
        call the same collectives.

        Args:
            permuted_local_hidden_states: [rows, h].
            tokens_per_expert: [num_local_experts] rows of each expert.
            permuted_probs: [rows] router probability of each row.
        """
        splits = tokens_per_expert.tolist()
        hidden_states = permuted_local_hidden_states.split(splits)
        probs = permuted_probs.split(splits)
        outputs = []
        for i, linears in enumerate(self.local_experts):
            rows, probs_of_rows = hidden_states[i], probs[i]
            if self.config.fp8:  # as in GroupedExperts
                rows, probs_of_rows = self._pad_tensor_for_quantization(rows, probs_of_rows)
            intermediate, _ = linears.linear_fc1(rows)
            intermediate = self.activation_func(intermediate, probs=probs_of_rows, expert=i)
            outputs.append(linears.linear_fc2(intermediate)[0][: splits[i]])
        return torch.cat(outputs), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None
    ) -> dict[str, Any]:
        """Return entries with the keys of :class:`GroupedExperts`."""
        weights = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        activation = self.activation_func.sharded_state_dict(
            f"{prefix}activation_func.", sharded_offsets, metadata
        )
        replace_prefix_for_sharding(activation, prefix, f"{prefix}experts.")
        return {**_without_empty_objects(weights), **activation}


def _mark_expert_weights(experts: torch.nn.Module) -> None:
    """Set the attributes from which the engine finds the ranks of a parameter's gradient."""
    for weight in experts.parameters():
        # Expert buffers, optimizer and data-parallel group at every expert-parallel size, so that
        # parameter groups, and with them checkpoints, are the same at all of them.
        weight.allreduce = False  # type: ignore[attr-defined]
        # In the gradient norm every rank counts its own part: of an expert, or other experts.
        weight.tensor_model_parallel = True  # type: ignore[attr-defined]


def _without_empty_objects(entries: dict[str, Any]) -> dict[str, Any]:
    """Leave out the ``_extra_state`` that the engine's linear maps save as None."""
    return {
        key: entry
        for key, entry in entries.items()
        if not (isinstance(entry, ShardedObject) and entry.data is None)
    }
