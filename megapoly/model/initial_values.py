"""Initial weights that depend on the seed alone, not on the layout or the device.

A weight is identified by its name in a checkpoint, its layer and its expert, which are the same at
every layout. Each whole weight is drawn from a generator that is seeded with this identity.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from megapoly.config import ModelConfig

# Matrices that write to the residual stream.
_RESIDUAL_OUTPUTS = ("linear_proj.weight", "linear_fc2.weight")
_TRUNCATION_STD = 3.0


def initial_value(
    key: str,
    index: tuple[int, ...],
    shape: tuple[int, ...],
    model: ModelConfig,
    seed: int,
    *,
    num_rows: int | None = None,
) -> Tensor:
    """Return one whole weight at the start of a run, fp32 on CPU.

    Args:
        key: name of the tensor in a checkpoint.
        index: layer, or layer and expert; empty if it has neither.
        shape: of the weight.
        model: distribution and std.
        seed: of the run.
        num_rows: rows of tokens in a matrix that is padded along the vocabulary. The other rows are
            zero, and a token's row does not depend on their number. None: all rows.

    Returns:
        Ones for a vector, which is a norm's weight. A matrix is normal with ``init_method_std``
        (``truncated_normal``: truncated at 3 std), divided by sqrt(2 num_layers) if it writes to
        the residual stream and ``scale_residual_init`` is set.
    """
    if len(shape) == 1:
        return torch.ones(shape)
    std = model.init_method_std
    if model.scale_residual_init and key.endswith(_RESIDUAL_OUTPUTS):
        std /= (2.0 * model.num_layers) ** 0.5
    value = torch.zeros(shape)
    _draw(value[:num_rows], std, model.init_method, f"{seed}/{key}/{tuple(index)}")
    return value


def _draw(weight: Tensor, std: float, method: str, identity: str) -> None:
    """Fill a whole weight from its own generator."""
    digest = hashlib.sha256(identity.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    if method == "truncated_normal":
        bound = _TRUNCATION_STD * std
        torch.nn.init.trunc_normal_(weight, 0.0, std, -bound, bound, generator=generator)
    else:
        weight.normal_(0.0, std, generator=generator)
