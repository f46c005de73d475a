"""The routed experts of a layer, with an activation that knows experts and probabilities."""

from __future__ import annotations

import dataclasses

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class GroupedExperts(TEGroupedMLP):
    """FC1, activation times router probability, FC2, on rows sorted by expert.

    Source: the engine's ``TEGroupedMLP`` (transformer/moe/experts.py:512), whose linear maps come
    from the spec, Transformer Engine's or :mod:`megapoly.model.grouped_linear`'s. Its activation
    gets neither the router probability nor the number of tokens of each expert, and cannot have
    coefficients for each expert, hence the forward here.

    Args:
        num_local_experts: experts on this rank.
        config: the engine's configuration.
        submodules: linear maps and activation.
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
        self.activation_func = build_module(
            submodules.activation_func, config=config, num_local_experts=num_local_experts
        )
        for linear in (self.linear_fc1, self.linear_fc2):
            for weight in linear.parameters():
                # Expert buffers, optimizer and data-parallel group at every expert-parallel size:
                # parameter groups, and with them checkpoints, are then the same at all of them.
                weight.allreduce = False

    def forward(
        self,
        permuted_local_hidden_states: Tensor,
        tokens_per_expert: Tensor,
        permuted_probs: Tensor,
    ) -> tuple[Tensor, None]:
        """[rows, h] -> [rows, h], for rows sorted by expert.

        Args:
            permuted_local_hidden_states: [rows, h].
            tokens_per_expert: [num_local_experts] rows of each expert.
            permuted_probs: [rows] router probability of each row.
        """
        splits = tokens_per_expert.tolist()
        intermediate, _ = self.linear_fc1(permuted_local_hidden_states, splits)
        intermediate = self.activation_func(
            intermediate, probs=permuted_probs, tokens_per_expert=tokens_per_expert
        )
        output, _ = self.linear_fc2(intermediate, splits)
        return output, None
