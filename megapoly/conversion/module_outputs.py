"""What every module of a model computes on some text, by the module's name in transformers."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

# Columns of the random matrix that sums up each row of the input embedding.
_NUM_SUMS = 8


@dataclasses.dataclass
class ModuleOutputs:
    """Outputs in the order in which they were computed.

    Args:
        outputs: [b, s, ..] fp32 by module, such as ``model.layers.0.self_attn``; the last is
            ``lm_head``, the logits.
        probs: [b, s, experts] the router's probability of every expert, by the module of the
            experts; zero where an expert was not chosen.
        rows: :func:`expert_probe_rows` of the layer, by the same names.
        every_expert: the output of a layer's experts on these rows, and the router's probabilities
            there; text alone leaves experts without a token.
        embedding: :func:`row_projections` of the whole input embedding, of which text shows a part.
    """

    outputs: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    probs: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    rows: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    every_expert: dict[str, tuple[Tensor, Tensor]] = dataclasses.field(default_factory=dict)
    embedding: Tensor = dataclasses.field(default_factory=lambda: torch.empty(0))

    def keep(self, name: str, output: Tensor) -> None:
        """Remember an output [b, s, ..]; heads are put together."""
        self.outputs[name] = output.detach().float().flatten(2).clone()

    @property
    def logits(self) -> Tensor:
        """[b, s, vocab]."""
        return self.outputs["lm_head"]


def expert_probe_rows(router_weight: Tensor) -> Tensor:
    """[1, experts, h]: for each expert the direction in which its router logit grows fastest.

    Scaled to a root mean square of 4, a few times that of what layers get.

    Args:
        router_weight: [experts, h].
    """
    rows = router_weight.detach().float()
    scale = rows.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-30)
    return (4.0 * rows / scale)[None]


def row_projections(weight: Tensor) -> Tensor:
    """[rows, h] -> [1, rows, 8]: each row times the same random matrix."""
    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(weight.shape[1], _NUM_SUMS, generator=generator)
    return (weight.detach().float() @ columns)[None]
