"""Effective rank against a full SVD in float64."""

import numpy as np
import pytest
import torch

from megapoly.conversion.checkpoint_reader import CheckpointReader, find_checkpoint
from megapoly.study.analysis.effective_rank import effective_rank, singular_values


def by_svd(matrix):
    values = np.linalg.svd(np.asarray(matrix, dtype=np.float64), compute_uv=False)
    p = values[values > 0] / values.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


@pytest.mark.parametrize("shape", [(40, 130), (130, 40), (64, 64), (1, 9)])
def test_equals_that_of_a_full_svd(shape):
    matrix = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    assert effective_rank(torch.from_numpy(matrix)) == pytest.approx(by_svd(matrix), rel=1e-12)


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_equal_singular_values_beside_zeros_are_counted(rank):
    left = np.linalg.qr(np.random.default_rng(1).standard_normal((50, rank)))[0]
    right = np.linalg.qr(np.random.default_rng(2).standard_normal((30, rank)))[0]
    matrix = torch.from_numpy(5.0 * left @ right.T)
    # Zeros come out as roots of rounding errors: 1e-8 of the largest, 30 of them.
    assert effective_rank(matrix) == pytest.approx(rank, rel=1e-5)


@pytest.mark.parametrize("last", [1e-3, 1e-8, 1e-14])
def test_falling_singular_values_lose_nothing_that_counts(last):
    rng = np.random.default_rng(3)
    left, right = (np.linalg.qr(rng.standard_normal((n, 96)))[0] for n in (200, 96))
    values = np.geomspace(1.0, last, 96)
    matrix = (left * values) @ right.T
    p = values / values.sum()
    exact = float(np.exp(-(p * np.log(p)).sum()))
    assert effective_rank(torch.from_numpy(matrix)) == pytest.approx(exact, rel=1e-6)
    found = singular_values(torch.from_numpy(matrix)).numpy()[::-1]
    np.testing.assert_allclose(found, values, atol=3e-8)


def test_zeros_have_none():
    assert effective_rank(torch.zeros(4, 6)) == 0.0


def test_each_half_of_each_expert_is_found_in_the_checkpoint(trained, analysis):
    reader = CheckpointReader(find_checkpoint(trained("tp2-ep2-etp1")))
    weights = analysis("tp2-ep2-etp1")["effective_rank"]["weights"]
    found = {(w["kind"], w["layer"], w["expert"], w["weight"]): w for w in weights}
    assert len(found) == len(weights) == 2 * 4 * (4 + 1)
    stored = reader.shapes["decoder.layers.mlp.experts.experts.linear_fc1.weight"]
    width = stored[2] // 2
    for layer, expert in [(0, 0), (1, 3)]:
        fc1 = reader.read(
            "decoder.layers.mlp.experts.experts.linear_fc1.weight", (layer, expert)
        ).numpy()
        for name, rows in {"gate": fc1[:width], "up": fc1[width:], "fc1": fc1}.items():
            entry = found["experts", layer, expert, name]
            assert entry["shape"] == list(rows.shape)
            assert entry["effective_rank"] == pytest.approx(by_svd(rows), rel=1e-9)
    fc2 = reader.read("decoder.layers.mlp.shared_experts.linear_fc2.weight", (1,)).numpy()
    entry = found["shared_experts", 1, None, "down"]
    assert entry["effective_rank"] == pytest.approx(by_svd(fc2), rel=1e-9)
