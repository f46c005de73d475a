"""Deterministic sums: the same bits of output and gradients however many ranks share a row.

With the backend ``reference``: to compile on every rank takes tens of seconds.
"""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist
from definitions import Arguments, make_arguments

from megapoly.errors import ShapeError
from megapoly.ops import polynorm, polyrelu
from megapoly.testing import run_on_ranks

OPERATORS = {"polynorm": polynorm, "polyrelu": polyrelu}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# A rank's part has 43, 86, 172 or 344 columns: the tails of vector instructions differ.
WIDTH = 8 * 43
CASES = {
    f"{operator} {form} {dtype} order {order}": (operator, form, dtype, order)
    for operator, form, dtype, order in [
        ("polynorm", "plain", "bf16", 3),
        ("polynorm", "plain", "fp32", 2),
        ("polynorm", "gated_experts", "bf16", 4),
        ("polynorm", "gated_experts", "fp32", 3),
        ("polyrelu", "gated_experts", "bf16", 3),
        ("polyrelu", "prelu_experts", "fp32", 4),
        ("polyrelu", "prelu", "fp32", 2),
    ]
}
SPLIT = ("output", "x", "gate")


def run_case(case, deterministic=True, rank=0, num_ranks=1, group=None):
    operator, form, dtype, order = CASES[case]
    arguments = make_arguments(form, order=order, shape=(10, WIDTH))
    rounded = arguments.to(DTYPES[dtype])
    for name in ("coefficients", "probs", "slope"):
        if getattr(arguments, name) is not None:
            setattr(rounded, name, getattr(arguments, name).float())
    return contiguous(rounded.columns(rank, num_ranks)).run(
        OPERATORS[operator], group=group, deterministic=deterministic, backend="reference"
    )


def contiguous(arguments: Arguments) -> Arguments:
    return Arguments(
        **{
            name: None if tensor is None else tensor.contiguous()
            for name, tensor in vars(arguments).items()
        }
    )


def run_cases(deterministic):
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    try:
        return {
            case: run_case(case, deterministic, group.rank(), group.size(), group) for case in CASES
        }
    finally:
        dist.destroy_process_group()


@functools.cache
def on_ranks(num_ranks, deterministic):
    return run_on_ranks(run_cases, num_ranks, deterministic)


def joined(results, name):
    return torch.cat([result[name] for result in results], dim=-1)


def equal_bits(results, expected, name):
    """Whether all ranks together hold the tensor of one rank."""
    if name in SPLIT:
        return torch.equal(joined(results, name), expected[name])
    return all(torch.equal(result[name], expected[name]) for result in results)


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
@pytest.mark.parametrize("case", CASES)
def test_same_bits_on_any_number_of_ranks(case, num_ranks):
    expected = run_case(case)
    results = [result[case] for result in on_ranks(num_ranks, True)]
    for name in expected:
        assert equal_bits(results, expected, name), name


@pytest.mark.parametrize("case", CASES)
def test_bits_depend_on_the_ranks_otherwise(case):
    expected = run_case(case, deterministic=False)
    results = [result[case] for result in on_ranks(4, False)]
    assert not all(equal_bits(results, expected, name) for name in expected)


def refusals():
    dist.init_process_group("gloo")
    try:
        messages = []
        for operator in OPERATORS.values():
            with pytest.raises(ShapeError) as error:
                x = torch.ones(2, 8, requires_grad=True)
                y = operator(
                    x,
                    torch.ones(4),
                    group=dist.group.WORLD,
                    deterministic=True,
                    backend="reference",
                )
                y.sum().backward()
            messages.append(str(error.value))
        return messages
    finally:
        dist.destroy_process_group()


def test_three_ranks_are_refused():
    for messages in run_on_ranks(refusals, 3):
        assert all("share it (3) must be 1, 2, 4 or 8" in message for message in messages)


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
def test_width_that_8_does_not_divide_is_refused(operator):
    x = torch.ones(2, 12, requires_grad=True)
    with pytest.raises(ShapeError, match="width \\(12\\) divisible by 8"):
        operator(x, torch.ones(4), deterministic=True, backend="reference").sum().backward()
