"""Cosine similarity between the hidden states of layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class LayerSimilarity:
    """Mean over tokens of the cosine between the same token's states at two depths.

        C[i, j] = mean_t h_i(t) . h_j(t) / (|h_i(t)| |h_j(t)|)

    h_0 is the embedding and h_l the residual stream after layer l, before the final norm, without
    centring. The paper specifies only "layer-wise cosine similarity of hidden states".

    Source: PolyCom (ICLR 2025), Fig. 7.

    In an MoE model a layer has a row for each expert, over the tokens T that it was chosen for:

        C_e[l, j] = mean_{t in T(l, e)} cos(h_{l+1}(t), h_j(t)),   l = 0 .. L - 1

    and their mean over the experts that got a token. The mean weighted by |T(l, e)| is row l + 1 of
    C, because every token has the same number of experts.

    Args:
        num_layers: L.
        num_experts: of each layer; 0: dense.
    """

    def __init__(self, num_layers: int, num_experts: int = 0) -> None:
        num_states = num_layers + 1
        self.num_tokens = 0
        self._sum = torch.zeros(num_states, num_states, dtype=torch.float64)
        self._expert_sum = torch.zeros(num_layers, num_experts, num_states, dtype=torch.float64)
        self._expert_tokens = torch.zeros(num_layers, num_experts, dtype=torch.float64)

    def add(self, states: Tensor, routing: Tensor | None = None) -> None:
        """Add the states of some tokens.

        Args:
            states: [L + 1, tokens, h].
            routing: [L, tokens, experts], whether the expert was chosen; None: dense.
        """
        directions = torch.nn.functional.normalize(states.float(), dim=-1)
        cosines = torch.einsum("ith,jth->tij", directions, directions).double()
        self.num_tokens += states.shape[1]
        self._sum += cosines.sum(0).cpu()
        if routing is not None:
            chosen = routing.double()
            self._expert_sum += torch.einsum("lte,tlj->lej", chosen, cosines[:, 1:]).cpu()
            self._expert_tokens += chosen.sum(1).cpu()

    def result(self) -> dict[str, Any]:
        """Return the entry ``similarity`` of analysis.json, without the name of the text.

        Returns:
            ``tokens``; ``states``: names; ``matrix``: C; ``experts``: null or ``per_layer``, each
            with ``layer``, ``tokens`` of each expert and ``matrix`` C_e[layer] [experts, L + 1]
            (null rows: no token), and ``mean`` [L, L + 1] over experts.
        """
        num_layers = len(self._expert_sum)
        return {
            "tokens": self.num_tokens,
            "states": ["embedding", *(f"layer {i + 1}" for i in range(num_layers))],
            "matrix": (self._sum / max(self.num_tokens, 1)).tolist(),
            "experts": self._experts() if self._expert_tokens.shape[1] else None,
        }

    def _experts(self) -> dict[str, Any]:
        per_layer, mean = [], []
        for i, (sums, tokens) in enumerate(zip(self._expert_sum, self._expert_tokens, strict=True)):
            rows = sums / tokens[:, None]
            reached = tokens > 0
            matrix = [
                row.tolist() if any_ else None for row, any_ in zip(rows, reached, strict=True)
            ]
            per_layer.append({"layer": i, "tokens": tokens.long().tolist(), "matrix": matrix})
            mean.append(rows[reached].mean(0).tolist())
        return {"per_layer": per_layer, "mean": mean}
