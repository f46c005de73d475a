"""Properties of a machine that the configuration of a job depends on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """The machine of every process of a job: this one, or one that a job is planned for.

    Args:
        cuda: whether there is a CUDA device and torch is built for it.
        compute_capability: of the CUDA device, such as (8, 0); None: not known.
        transformer_engine: whether Transformer Engine is installed.
        transformer_engine_version: such as ``2.11.0``; None: not known, or not installed.
        apex: whether apex is installed with its kernel ``fused_weight_gradient_mlp_cuda``.
        cuda_version: of the toolkit that torch is built with, such as (12, 9); None: not known.
    """

    cuda: bool = False
    compute_capability: tuple[int, int] | None = None
    transformer_engine: bool = False
    transformer_engine_version: str | None = None
    apex: bool = False
    cuda_version: tuple[int, int] | None = None


CPU = Machine()
