"""Rows that are split over ranks: the same output and complete gradients as on one rank."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from definitions import FORMS, POLYNORM_FORMS, assert_close, make_arguments, module_operator

from megapoly.ops import PolyNorm, PolyReLU, polynorm, polyrelu
from megapoly.ops.collectives import is_split, scale_gradient, sum_over_ranks
from megapoly.testing import run_on_ranks

OPERATORS = {"polynorm": polynorm, "polyrelu": polyrelu}
MODULES = {"PolyNorm": module_operator(PolyNorm), "PolyReLU": module_operator(PolyReLU)}
CASES = {
    **{
        f"polynorm {norm} {form}": ("polynorm", form, {"norm": norm, "backend": "reference"})
        for norm in ("rms", "l2")
        for form in POLYNORM_FORMS
    },
    **{f"polyrelu {form}": ("polyrelu", form, {"backend": "reference"}) for form in FORMS},
    "PolyNorm": ("PolyNorm", "gated_experts", {"backend": "reference"}),
    "PolyReLU": ("PolyReLU", "prelu_experts", {"backend": "reference"}),
}
SPLIT = ("output", "x", "gate")


def run_case(case, rank=0, num_ranks=1, group=None):
    operator, form, options = CASES[case]
    arguments = make_arguments(form).columns(rank, num_ranks)
    return arguments.run((OPERATORS | MODULES)[operator], group=group, **options)


def run_cases():
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    try:
        return {case: run_case(case, group.rank(), group.size(), group) for case in CASES}
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4])
def on_ranks(request):
    return run_on_ranks(run_cases, request.param)


@pytest.mark.parametrize("case", CASES)
def test_equals_one_rank(on_ranks, case):
    expected = run_case(case)
    results = [result[case] for result in on_ranks]
    for result in results:
        joined = {
            name: torch.cat([r[name] for r in results], dim=-1) if name in SPLIT else tensor
            for name, tensor in result.items()
        }
        assert_close(joined, expected)


def no_rows():
    """An expert-tensor-parallel pair may receive no tokens at all."""
    dist.init_process_group("gloo")
    try:
        x = torch.ones(0, 4, requires_grad=True)
        coefficients = torch.ones(4, requires_grad=True)
        for operator in OPERATORS.values():
            operator(x, coefficients, group=dist.group.WORLD, backend="reference").sum().backward()
        return x.grad.shape, coefficients.grad.tolist()
    finally:
        dist.destroy_process_group()


def test_no_rows():
    assert run_on_ranks(no_rows, 2) == [((0, 4), [0.0] * 4)] * 2


def collectives():
    """Return a sum of r + 1 over ranks r, and what is summed."""
    dist.init_process_group("gloo")
    group, rank = dist.group.WORLD, dist.get_rank()
    try:
        x = torch.tensor([rank + 1.0])
        return is_split(group), sum_over_ranks(x, group).item(), x.item()
    finally:
        dist.destroy_process_group()


def test_sum_over_ranks():
    for rank, result in enumerate(run_on_ranks(collectives, 2)):
        assert result == (True, 3.0, rank + 1.0)


def test_sum_without_a_group():
    x = torch.ones(2)
    assert not is_split(None) and sum_over_ranks(x, None) is x


def test_scale_gradient():
    x = torch.ones(2, requires_grad=True)
    y = scale_gradient(x, 0.25)
    y.sum().backward()
    assert torch.equal(y, x) and x.grad.tolist() == [0.25, 0.25]
    assert scale_gradient(x, 1.0) is x
