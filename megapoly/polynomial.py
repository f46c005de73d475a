"""Facts about the polynomials that operators, configuration and commands share.

Imports nothing, so that reading a configuration does not import torch.
"""

from __future__ import annotations

from typing import Literal

ORDERS = (2, 3, 4)
DEFAULT_ORDER = 3
DEFAULT_EPS = 1e-6
# Of PolyPReLU below zero, torch's own for PReLU.
DEFAULT_SLOPE = 0.25

Norm = Literal["rms", "l2"]
Backend = Literal["auto", "reference", "compiled", "triton"]


def initial_coefficients(order: int) -> list[float]:
    """Return a0 .. ar in ascending order: a0 = 0 and a1 .. ar = 1 / r.

    Source: PolyCom (ICLR 2025), section 2.
    """
    return [0.0] + [1.0 / order] * order
