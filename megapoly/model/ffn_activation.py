"""Module of the engine's activation slot: coefficients, their process groups and checkpoints."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megapoly.activations import ActivationInputs, registry
from megapoly.ops import expert_offsets
from megapoly.ops.collectives import scale_gradient
from megapoly.polynomial import DEFAULT_EPS, DEFAULT_ORDER, Backend, Norm


@dataclass(frozen=True)
class ActivationSettings:
    """Activation fields of the configuration; ``ModelConfig`` describes them."""

    name: str
    order: int = DEFAULT_ORDER
    coefficients: Literal["shared", "per_expert"] = "shared"
    norm: Norm = "rms"
    eps: float = DEFAULT_EPS
    backend: Backend = "auto"
    deterministic: bool = False


Slot = Literal["ffn", "experts", "one expert"]


class FFNActivation(MegatronModule):
    """Activation between FC1 and FC2, of a dense FFN, a shared expert or a layer's routed experts.

    Source: fills ``MLPSubmodules.activation_func`` (transformer/mlp.py:136, moe/experts.py:555,
    moe/shared_experts.py:190 of Megatron-Core 0.16.1).

    Args:
        config: the engine's configuration.
        settings: of the activation.
        num_local_experts: routed experts on this rank, for one activation of all of them, as
            :mod:`megapoly.model.experts` builds it; None for a dense FFN or shared expert, and in
            the engine's own modules of routed experts, which are recognised.

    Raises:
        ValueError: the engine's own module of routed experts cannot have these coefficients.

    Note:
        Parameters are named as in the registry, each [n] or, with one set per expert,
        [num_local_experts, n]. A row is shared by the tensor-parallel group (routed experts: the
        expert-tensor-parallel group), and the operators complete the gradients over that group.
        A set that all experts of a layer share is a dense parameter: its gradient is the sum over
        the tokens of all ranks. The ranks of one row have the same sum, so each contributes its
        share, and the engine adds the shares over the tensor-parallel group as it does for layer
        norms (``param.sequence_parallel``), then over the data-parallel group.

        The engine's ``SequentialMLP`` builds an activation for each expert, so it can have a set
        per expert only; its ``TEGroupedMLP`` builds one for all and does not tell it whose the rows
        are, so it can have a shared set only. Both multiply by the router probability themselves.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        settings: ActivationSettings,
        num_local_experts: int | None = None,
    ) -> None:
        super().__init__(config=config)
        self.settings = settings
        self.activation = registry.get(settings.name)
        self.slot: Slot = _slot_of_engine() if num_local_experts is None else "experts"
        self.is_expert = self.slot != "ffn"
        self.per_expert = self.is_expert and settings.coefficients == "per_expert"
        if self.activation.has_coefficients:
            _check_slot(self.slot, settings, num_local_experts)
        self.row_group = (
            parallel_state.get_expert_tensor_parallel_group()
            if self.is_expert
            else parallel_state.get_tensor_model_parallel_group()
        )
        # In a checkpoint the engine distinguishes the replicas of a parameter by `tp_group`.
        self.tp_group = (
            self.row_group
            if self.slot == "one expert"
            else parallel_state.get_tensor_model_parallel_group()
        )
        self.coefficient_names: list[str] = []
        if self.activation.coefficients is not None:
            for name, values in self.activation.coefficients(settings.order).items():
                self._add_coefficients(name, values, num_local_experts)

    def _add_coefficients(
        self, name: str, values: list[float], num_local_experts: int | None
    ) -> None:
        value = torch.tensor(values, dtype=self.config.params_dtype)
        if num_local_experts is not None and self.per_expert:
            value = value.repeat(num_local_experts, 1)
        parameter = torch.nn.Parameter(value)
        if self.per_expert:
            # Expert buffers, optimizer and data-parallel group, at every expert-parallel size.
            parameter.allreduce = False  # type: ignore[attr-defined]
            if self.slot == "one expert" and self.row_group.size() == 1:
                # Other tensor-parallel ranks have other experts: each counts in the gradient norm.
                parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
        else:
            parameter.sequence_parallel = self.is_expert  # type: ignore[attr-defined]
        self.register_parameter(name, parameter)
        self.coefficient_names.append(name)

    def forward(
        self,
        x: Tensor,
        probs: Tensor | None = None,
        tokens_per_expert: Tensor | None = None,
        expert: int | None = None,
    ) -> Tensor:
        """Activate FC1's output.

        Args:
            x: [..., d / tp], or [..., 2 d / tp] for a gated activation: first the activated half.
            probs: [rows] router probabilities, multiplied in; routed experts only.
            tokens_per_expert: [num_local_experts] rows of each expert, for rows sorted by expert.
            expert: local expert of all rows, instead of ``tokens_per_expert``.

        Returns:
            [..., d / tp] in the dtype of ``x``.
        """
        gate: Tensor | None = None
        if self.activation.gated:
            x, gate = x.chunk(2, dim=-1)
        if not self.activation.has_coefficients:
            return self.activation.function(ActivationInputs(x, gate, probs))
        if probs is not None:
            # The operator's gradient of probs is complete on each rank of the row; the engine's
            # dispatcher sums over these ranks (moe/token_dispatcher.py, gather of probs).
            probs = scale_gradient(probs, 1.0 / self.row_group.size())
        offsets: Tensor | None = None
        if self.per_expert and self.slot == "experts" and expert is None:
            assert tokens_per_expert is not None, "one set per expert needs `tokens_per_expert`"
            offsets = expert_offsets(tokens_per_expert, x.device)
        return self.activation.function(
            ActivationInputs(
                x,
                gate,
                probs,
                coefficients=self._coefficients(expert),
                offsets=offsets,
                group=self.row_group,
                eps=self.settings.eps,
                norm=self.settings.norm,
                deterministic=self.settings.deterministic,
                backend=self.settings.backend,
            )
        )

    def _coefficients(self, expert: int | None) -> dict[str, Tensor]:
        """Return the coefficients by name, of one local expert if ``expert`` names it."""
        values = {name: getattr(self, name) for name in self.coefficient_names}
        if self.per_expert:
            return values if expert is None else {n: v[expert] for n, v in values.items()}
        share = 1.0 / self.row_group.size() if self.is_expert else 1.0
        return {name: scale_gradient(value, share) for name, value in values.items()}

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return entries, sharded along the expert axis or, if experts share a set, replicated."""
        if not self.per_expert or self.slot == "one expert":
            # The engine's SequentialMLP adds the expert's place to `sharded_offsets`.
            return super().sharded_state_dict(prefix, sharded_offsets, metadata)
        expert_axis = len(sharded_offsets)
        expert_rank = parallel_state.get_expert_model_parallel_rank()
        num_expert_ranks = parallel_state.get_expert_model_parallel_world_size()
        replica = (0, self.row_group.rank(), parallel_state.get_expert_data_parallel_rank())
        return {
            f"{prefix}{name}": ShardedTensor.from_rank_offsets(
                f"{prefix}{name}",
                getattr(self, name),
                *sharded_offsets,
                (expert_axis, expert_rank, num_expert_ranks),
                replica_id=replica,
                prepend_axis_num=len(sharded_offsets),
            )
            for name in self.coefficient_names
        }


def _slot_of_engine() -> Slot:
    """Return for what the engine is building the activation that is under construction.

    The engine passes an activation its configuration alone (transformer/mlp.py:136,
    moe/experts.py:555): only the constructor that builds it knows that it is a routed expert's.
    """
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, TEGroupedMLP):
            return "experts"
        if isinstance(owner, MLP):
            return "one expert" if frame.f_locals.get("is_expert") else "ffn"
        frame = frame.f_back
    return "ffn"


def _check_slot(slot: Slot, settings: ActivationSettings, num_local_experts: int | None) -> None:
    """Raise :class:`ValueError` where the engine's own experts cannot have these coefficients."""
    if slot == "one expert" and settings.coefficients == "shared":
        module, reason, ours = "SequentialMLP", "an activation for each expert", "SequentialExperts"
    elif slot == "experts" and num_local_experts is None and settings.coefficients == "per_expert":
        module, ours = "TEGroupedMLP", "GroupedExperts"
        reason = "one activation for all experts and does not tell it whose the rows are"
    else:
        return
    other = "per_expert" if settings.coefficients == "shared" else "shared"
    raise ValueError(
        f"The engine's {module} builds {reason}, so its {settings.name} cannot have "
        f"`coefficients={settings.coefficients!r}`. Set `coefficients={other!r}`, or make "
        f"`megapoly.model.experts.{ours}` the module of the experts' spec."
    )
