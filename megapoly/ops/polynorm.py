"""PolyNorm: a polynomial whose powers are each normalised over the FFN width."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from megapoly.ops.arguments import as_rows, check_eps, check_norm
from megapoly.ops.collectives import is_split, name_of
from megapoly.ops.polynorm_registration import polynorm_evaluate, polynorm_forward, polynorm_rsqrt
from megapoly.ops.recomputation import row_statistics
from megapoly.polynomial import DEFAULT_EPS, Backend, Norm


def polynorm(
    x: Tensor,
    coefficients: Tensor,
    *,
    eps: float = DEFAULT_EPS,
    norm: Norm = "rms",
    group: dist.ProcessGroup | None = None,
    offsets: Tensor | None = None,
    probs: Tensor | None = None,
    gate: Tensor | None = None,
    deterministic: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """Compute a weighted sum of powers of ``x``, each normalised over the whole FFN width.

        y = p (a0 + a1 n(x) + a2 n(x^2) + .. + ar n(x^r)) u,   n(v) = v / sqrt(mean(v^2) + eps)

    With ``norm="l2"`` the mean is a sum. The backward pass is the closed form

        S_k = sum_j g_j x_j^k,   T_k = r_k S_k,   A_k = p k a_k r_k,   B_k = A_k r_k T_k / d
        dx = g (A_1 + A_2 x + ..) - x (B_1 + B_2 x^2 + ..),   da_k = sum_rows p T_k

    where r_k is the reciprocal root of the k-th mean square and d the width (``l2``: 1).

    Source: PolyCom (ICLR 2025), Eq. 3, with the released code's root mean square.

    Args:
        x: [..., d / tp]; any floating dtype; any finite value of bf16 or fp32.
        coefficients: [r + 1], ascending powers, or [experts, r + 1] with ``offsets``; r is 2 to 4.
        eps: added to the mean square (``l2``: to the sum of squares); 1e-30 to 1e6.
        norm: divides a power by its root mean square (``rms``) or its L2 norm (``l2``).
        group: ranks that share one row, each with the same number of columns; statistics are over
            the columns of all of them. One all-reduce forward and one backward, of r fp64 and r + 1
            fp32 numbers per row.
        offsets: [experts + 1] int32 for rows sorted by expert, ascending from 0 to at most the
            number of rows, see :func:`megapoly.ops.expert_offsets`; ``x`` is then [rows, d / tp].
            It stays on the device. Rows from offsets[experts] on are padding: output and gradients
            are 0 there, whatever ``x`` holds.
        probs: p, one per row (the router probability).
        gate: u, of the shape of ``x`` (the gated form).
        deterministic: give the same bits on 1, 2, 4 and 8 ranks: 8 segments of a row are added in a
            fixed order, with an all-gather instead of the all-reduce.
        backend: ``reference`` is plain PyTorch, ``compiled`` the same through torch.compile,
            ``triton`` CUDA kernels; ``auto`` takes the fastest one available.

    Returns:
        [..., d / tp] in the dtype of ``x``; statistics and sums are fp32 (fp64 for fp64).

    Raises:
        ShapeError: the arguments do not fit together.
        ValueError: ``eps``, ``norm`` or ``backend`` is not valid.
        UnavailableError: the backend cannot run on this machine.
        NotImplementedError: forward-mode or second derivatives are requested.

    Note:
        Gradients of ``coefficients`` and ``probs`` are complete and equal on every rank of
        ``group``: they come from sums that the backward pass has already reduced. The backward pass
        needs ``x`` and r numbers per row, which the forward pass saves.
    """
    rows = as_rows(x, coefficients, offsets, probs, gate)
    check_eps(eps)
    check_norm(norm)
    num_ranks = group.size() if group is not None else 1
    divisor = x.shape[-1] * num_ranks if norm == "rms" else 1
    parameters = (rows.coefficients, rows.probs, rows.gate, rows.offsets)
    if not is_split(group) and not deterministic:
        y, _ = polynorm_forward(rows.x, *parameters, eps, divisor, backend)
        return y.view(x.shape)
    layout = (divisor, name_of(group), deterministic, backend)
    order = coefficients.shape[-1] - 1
    rsqrt = row_statistics(lambda: polynorm_rsqrt(rows.x.detach(), order, eps, *layout))
    return polynorm_evaluate(rows.x, rsqrt, *parameters, *layout).view(x.shape)
