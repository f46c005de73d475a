"""PolyReLU and PolyPReLU against their definition in float64."""

from __future__ import annotations

import functools

import pytest
import torch
from definitions import FORMS, assert_close, make_arguments, polyrelu_definition

from megapoly.errors import ShapeError
from megapoly.ops import polyrelu as polyrelu_of_any_backend

polyrelu = functools.partial(polyrelu_of_any_backend, backend="reference")


@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize("form", FORMS)
def test_equals_definition(form, order):
    arguments = make_arguments(form, order=order)
    assert_close(arguments.run(polyrelu), arguments.run(polyrelu_definition))


@pytest.mark.parametrize("form", ["gated", "routed", "prelu"])
@pytest.mark.parametrize("shape", [(2, 3, 24), (4, 1)])
def test_equals_definition_at_other_shapes(form, shape):
    arguments = make_arguments(form, shape=shape)
    assert_close(arguments.run(polyrelu), arguments.run(polyrelu_definition))


def test_experts_of_one_column():
    arguments = make_arguments("prelu_experts", shape=(10, 1))
    assert_close(arguments.run(polyrelu), arguments.run(polyrelu_definition))


def test_strided_input():
    arguments = make_arguments("gated_experts")
    expected = arguments.run(polyrelu_definition)
    arguments.x = arguments.x.t().contiguous().t()
    arguments.gate = arguments.gate.t().contiguous().t()
    assert_close(arguments.run(polyrelu), expected)


@pytest.mark.parametrize("form", ["prelu", "prelu_experts"])
def test_no_rows(form):
    arguments = make_arguments(form, shape=(1, 24))
    for name in ("x", "probs", "grad_output"):
        if getattr(arguments, name) is not None:
            setattr(arguments, name, getattr(arguments, name)[:0])
    if arguments.offsets is not None:
        arguments.offsets = torch.zeros_like(arguments.offsets)
    result = arguments.run(polyrelu)
    assert result["output"].shape == (0, 24)
    assert not result["coefficients"].any() and not result["slope"].any()


def test_expert_without_rows_has_no_gradient():
    result = make_arguments("prelu_experts").run(polyrelu)
    for name in ("coefficients", "slope"):
        assert not result[name][1].any()
        assert result[name][[0, 2, 3]].any(dim=-1).all()


@pytest.mark.parametrize("form", ["gated_experts", "prelu_experts"])
def test_gradcheck(form):
    arguments = make_arguments(form, order=4, shape=(4, 5))
    names = [*("x", "coefficients"), *(n for n in FORMS[form] if n != "offsets")]
    tensors = [getattr(arguments, name).requires_grad_() for name in names]

    def call(*tensors):
        keywords = dict(zip(names, tensors, strict=True)) | {"offsets": arguments.offsets}
        return polyrelu(keywords.pop("x"), keywords.pop("coefficients"), **keywords)

    torch.autograd.gradcheck(call, tensors)


def test_below_zero_only_the_constant_term_is_left():
    x = -torch.rand(3, 8, requires_grad=True)
    x.retain_grad()
    y = polyrelu(x, torch.tensor([0.5, 1.0, 1.0, 1.0]))
    y.sum().backward()
    assert torch.equal(y, torch.full_like(y, 0.5))
    assert not x.grad.any()


@pytest.mark.parametrize("form", ["gated", "prelu"])
def test_bfloat16_is_the_exact_answer_rounded(form):
    """The root-mean-square error is within 5 % of that of rounding the exact answer."""
    arguments = make_arguments(form, shape=(16, 1536))
    half = arguments.to(torch.bfloat16)
    half.coefficients = arguments.coefficients.float()
    exact = half.to(torch.float64).run(polyrelu_definition)
    actual = half.run(polyrelu)
    for name in {"output", "x", "gate"} & actual.keys():
        assert actual[name].dtype == torch.bfloat16
        error = (actual[name].double() - exact[name]).square().mean().sqrt()
        rounding = (exact[name].bfloat16().double() - exact[name]).square().mean().sqrt()
        assert error <= 1.05 * rounding, name


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"coefficients": torch.ones(2, 4)}, "offsets"),
        ({"probs": torch.ones(3, 8)}, "probs"),
        ({"gate": torch.ones(3, 4)}, "gate"),
        ({"slope": torch.ones(3)}, "slope"),
        (
            {
                "coefficients": torch.ones(2, 4),
                "offsets": torch.tensor([0, 1, 3]),
                "slope": torch.ones(1),
            },
            "slope",
        ),
    ],
)
def test_shapes_that_do_not_fit(changes, word):
    arguments = {"x": torch.ones(3, 8), "coefficients": torch.ones(4)} | changes
    with pytest.raises(ShapeError, match=word):
        polyrelu(arguments.pop("x"), arguments.pop("coefficients"), **arguments)
