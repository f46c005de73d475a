"""Outputs of every module of a model on some text, by the module's name in transformers."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

# Columns of the random matrix that each row of the input embedding is multiplied by.
_NUM_PROJECTIONS = 8


@dataclasses.dataclass
class ModuleOutputs:
    """Outputs of modules, in the order of computation.

    Args:
        outputs: [b, s, ..] fp32 by module, such as ``model.layers.0.self_attn``; the last one is
            ``lm_head``, the logits.
        probs: [b, s, experts] the router's probability of every expert, by the module of the
            experts; zero if an expert was not chosen.
        probe_rows: :func:`expert_probe_rows` of each layer, by the same names.
        probe_outputs: output of a layer's experts on these rows, and the router's probabilities for
            them. Text alone does not reach every expert.
        embedding: :func:`row_projections` of the whole input embedding. Text uses only part of it.
    """

    outputs: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    probs: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    probe_rows: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    probe_outputs: dict[str, tuple[Tensor, Tensor]] = dataclasses.field(default_factory=dict)
    embedding: Tensor = dataclasses.field(default_factory=lambda: torch.empty(0))

    def record(self, name: str, output: Tensor) -> None:
        """Store an output [b, s, ..]; all axes after the second become one."""
        self.outputs[name] = output.detach().float().flatten(2).clone()

    def texts(self, which: slice) -> ModuleOutputs:
        """Return the outputs on some of the texts; those on other rows are all kept."""
        outputs, probs = (
            {name: tensor[which] for name, tensor in tensors.items()}
            for tensors in (self.outputs, self.probs)
        )
        return dataclasses.replace(self, outputs=outputs, probs=probs)

    def append(self, other: ModuleOutputs) -> None:
        """Add the outputs of the same model on other texts."""
        for tensors, more in ((self.outputs, other.outputs), (self.probs, other.probs)):
            for name, tensor in more.items():
                tensors[name] = torch.cat([tensors[name], tensor])

    @property
    def logits(self) -> Tensor:
        """[b, s, vocab]."""
        return self.outputs["lm_head"]


def expert_probe_rows(router_weight: Tensor) -> Tensor:
    """Return for each expert the direction in which its router logit grows fastest.

    Rows have a root mean square of 4, a few times larger than a layer's input.

    Args:
        router_weight: [experts, h].

    Returns:
        [1, experts, h].
    """
    rows = router_weight.detach().float()
    scale = rows.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-30)
    return (4.0 * rows / scale)[None]


def row_projections(weight: Tensor) -> Tensor:
    """Multiply each row by the same random matrix: [rows, h] -> [1, rows, 8]."""
    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(weight.shape[1], _NUM_PROJECTIONS, generator=generator)
    return (weight.detach().float() @ columns)[None]
