"""Effective rank of every FFN weight of a checkpoint, read one matrix at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from megapoly.conversion.checkpoint_model import checked_mappings, read_tensors
from megapoly.conversion.checkpoint_reader import CheckpointReader
from megapoly.conversion.tensor_map import TensorMapping

METHOD = (
    "Erank = exp(-sum p_i ln p_i), p_i = s_i / sum s (Eq. 36); the singular values s_i are the "
    "roots of the eigenvalues of the smaller Gram matrix, all in float64"
)
_FFN_WEIGHT = re.compile(
    r"model\.layers\.(?P<layer>\d+)\.mlp\."
    r"(?:(?P<routed>experts)\.(?P<expert>\d+)\.|(?P<shared>shared_expert)\.)?"
    r"(?P<name>gate|up|down)_proj\.weight"
)


def singular_values(matrix: Tensor) -> Tensor:
    """Return the singular values of a matrix, the smallest first.

        s_i = sqrt(max(lambda_i, 0)),   lambda = eigenvalues of A A^T or A^T A, the smaller

    For m >= n the product takes m n^2 multiplications and its eigenvalues about 4 n^3 / 3; it needs
    two n x n matrices in addition to A.

    Args:
        matrix: [m, n], any floating dtype.

    Returns:
        [min(m, n)] fp64.

    Note:
        Eigenvalues are correct to about 1e-16 of the largest, so a singular value that is zero may
        be computed as 1e-8 s_1. To the effective rank of a matrix of rank 1 this adds at most
        n 1e-8 times a logarithm of 20.
    """
    a = matrix.double()
    gram = a @ a.T if a.shape[0] <= a.shape[1] else a.T @ a
    return torch.linalg.eigvalsh(gram).clamp_min(0.0).sqrt()


def effective_rank(matrix: Tensor) -> float:
    """Return the effective number of directions of a matrix, weighted by singular values.

        Erank(A) = exp(-sum_i p_i ln p_i),   p_i = s_i / sum_j s_j

    It is k for k equal singular values and zeros otherwise, and 0 for a matrix of zeros.

    Source: PolyCom (ICLR 2025), Eq. 36; Roy and Vetterli (2007).

    Args:
        matrix: [m, n], any floating dtype.
    """
    values = singular_values(matrix)
    total = values.sum()
    if total == 0:
        return 0.0
    return torch.special.entr(values / total).sum().exp().item()


def ffn_weights(reader: CheckpointReader) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """Yield every FFN weight of a checkpoint of any layout; needs memory for two matrices.

    FC1 of a gated activation is stored as one matrix, the rows of the gate above those of the other
    factor. It is yielded as three: ``gate``, ``up`` and, as it is stored, ``fc1``.

    Yields:
        Place of the weight, and the weight: ``layer``; ``kind`` (ffn, experts, shared_experts);
        ``expert`` (null outside routed experts); ``weight`` (fc1, gate, up, down), ``shape``.

    Raises:
        CheckpointError: the checkpoint is incomplete, or a weight is not finite.
    """
    wanted = list(_links(reader))
    gate: Tensor | None = None
    for link, tensor in read_tensors(reader, wanted):
        name = _match(link)["name"]
        if name == "gate":
            gate = tensor
            yield _entry(link, "gate", tensor), tensor
        elif name == "down":
            yield _entry(link, "down", tensor), tensor
        elif gate is None:
            yield _entry(link, "fc1", tensor), tensor
        else:
            yield _entry(link, "up", tensor), tensor
            both, gate = torch.cat([gate, tensor]), None
            yield _entry(link, "fc1", both), both


def effective_ranks(
    reader: CheckpointReader, device: str, on_progress: Callable[[int, int], None]
) -> dict[str, Any]:
    """Compute the effective rank of every FFN weight.

    Args:
        reader: of the checkpoint.
        device: where to compute.
        on_progress: called with the number of matrices read and the total.

    Returns:
        ``method``; ``weights``: the entries of :func:`ffn_weights` with ``effective_rank``.
    """
    num_stored = sum(_match(link)["name"] != "gate" for link in _links(reader))
    weights: list[dict[str, Any]] = []
    done = 0
    for entry, matrix in ffn_weights(reader):
        weights.append(entry | {"effective_rank": effective_rank(matrix.to(device))})
        done += entry["weight"] in ("fc1", "down")
        on_progress(done, num_stored)
    return {"method": METHOD, "weights": weights}


def _links(reader: CheckpointReader) -> Iterator[TensorMapping]:
    return (link for link in checked_mappings(reader) if _FFN_WEIGHT.fullmatch(link.name))


def _match(link: TensorMapping) -> re.Match[str]:
    match = _FFN_WEIGHT.fullmatch(link.name)
    assert match is not None, "links are chosen by this pattern"
    return match


def _entry(link: TensorMapping, weight: str, matrix: Tensor) -> dict[str, Any]:
    match = _match(link)
    expert = match["expert"]
    kind = "experts" if match["routed"] else "shared_experts" if match["shared"] else "ffn"
    return {
        "layer": int(match["layer"]),
        "kind": kind,
        "expert": None if expert is None else int(expert),
        "weight": weight,
        "shape": list(matrix.shape),
    }
