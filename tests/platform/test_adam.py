"""Our Adam makes the same steps as torch's, with the state layout of the fused optimizers."""

from __future__ import annotations

import pytest
import torch

from megapoly.platform.adam import Adam

BETAS, EPS = (0.9, 0.95), 1e-8


def parameters():
    generator = torch.Generator().manual_seed(0)
    shapes = ((5, 3), (3,))
    return [torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes]


def trained(make_optimizer, *, steps=7):
    """Return parameters after some steps on a quartic bowl; matrices decay, vectors do not."""
    matrix, vector = (tensor.clone().requires_grad_() for tensor in parameters())
    optimizer = make_optimizer(
        [{"params": [matrix], "weight_decay": 0.1}, {"params": [vector], "weight_decay": 0.0}]
    )
    for step in range(steps):
        optimizer.zero_grad()
        ((matrix @ vector).square().sum() + vector.pow(4).sum() + matrix.sum()).backward()
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / (step + 1)
        optimizer.step()
    return matrix.detach(), vector.detach()


@pytest.mark.parametrize(
    ("adam_w_mode", "reference"), [(True, torch.optim.AdamW), (False, torch.optim.Adam)]
)
def test_takes_the_steps_of_torch(adam_w_mode, reference):
    actual = trained(lambda groups: Adam(groups, betas=BETAS, eps=EPS, adam_w_mode=adam_w_mode))
    expected = trained(lambda groups: reference(groups, betas=BETAS, eps=EPS))
    for a, b, start in zip(actual, expected, parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        assert (a - start).abs().min() > 1e-3


def test_without_bias_correction():
    p = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    p.grad = torch.tensor([2.0], dtype=torch.float64)
    Adam([p], lr=0.1, betas=BETAS, eps=EPS, bias_correction=False).step()
    assert p.item() == pytest.approx(1 - 0.1 * (0.1 * 2) / ((0.05 * 4) ** 0.5 + EPS), rel=1e-12)


def test_state_layout_is_that_of_the_fused_optimizers():
    used, unused = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    optimizer = Adam([used, unused])
    used.grad = torch.ones(2)
    optimizer.step()
    optimizer.step()
    assert optimizer.param_groups[0]["step"] == 2
    assert set(optimizer.state[used]) == {"exp_avg", "exp_avg_sq"}
    assert unused not in optimizer.state and torch.equal(unused, torch.ones(2))


def test_takes_no_closure():
    with pytest.raises(ValueError, match="closure"):
        Adam([torch.ones(1, requires_grad=True)]).step(lambda: 0.0)
