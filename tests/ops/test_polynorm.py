"""PolyNorm against its definition in float64: output, every gradient, precision, refusals."""

from __future__ import annotations

import pytest
import torch
from definitions import POLYNORM_FORMS, assert_close, make_arguments, polynorm_definition

from megapoly.errors import ShapeError
from megapoly.ops import polynorm
from megapoly.ops.backends import compiler_missing

ORDERS = (2, 3, 4)
NORMS = ("rms", "l2")
WIDTHS = (1, 2, 123, 1536, 8256, 11008)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("form", POLYNORM_FORMS)
def test_equals_definition(form, order, norm):
    arguments = make_arguments(form, order=order)
    expected = arguments.run(polynorm_definition, norm=norm)
    assert_close(arguments.run(polynorm, norm=norm, backend="reference"), expected)


@pytest.mark.parametrize("width", WIDTHS)
def test_equals_definition_at_every_width(width):
    arguments = make_arguments("plain", shape=(3, width))
    expected = arguments.run(polynorm_definition)
    assert_close(arguments.run(polynorm, backend="reference"), expected, 1e-11)


@pytest.mark.parametrize("form", ["gated", "routed"])
def test_leading_dimensions_are_rows(form):
    arguments = make_arguments(form, shape=(2, 3, 24))
    expected = arguments.run(polynorm_definition)
    assert_close(arguments.run(polynorm, backend="reference"), expected)


@pytest.mark.parametrize("form", ["gated_experts", "gated"])
def test_strided_input(form):
    arguments = make_arguments(form)
    expected = arguments.run(polynorm_definition)
    arguments.x = arguments.x.t().contiguous().t()
    arguments.gate = torch.cat([arguments.gate, arguments.gate], dim=-1).chunk(2, dim=-1)[1]
    arguments.grad_output = arguments.grad_output.t().contiguous().t()
    assert not arguments.x.is_contiguous() and not arguments.gate.is_contiguous()
    assert_close(arguments.run(polynorm, backend="reference"), expected)


def test_gradient_of_a_plain_sum():
    arguments = make_arguments("plain")
    arguments.grad_output = torch.ones((), dtype=torch.float64).expand_as(arguments.x)
    expected = arguments.run(polynorm_definition)
    assert_close(arguments.run(polynorm, backend="reference"), expected)


@pytest.mark.parametrize("form", ["plain", "gated_experts"])
def test_no_rows(form):
    arguments = make_arguments(form, shape=(1, 24))
    for name in ("x", "gate", "probs", "grad_output"):
        if getattr(arguments, name) is not None:
            setattr(arguments, name, getattr(arguments, name)[:0])
    if arguments.offsets is not None:
        arguments.offsets = torch.zeros_like(arguments.offsets)
    result = arguments.run(polynorm, backend="reference")
    assert result["output"].shape == (0, 24)
    assert not result["coefficients"].any()


def test_expert_without_rows_has_no_gradient():
    gradient = make_arguments("experts").run(polynorm, backend="reference")["coefficients"]
    assert torch.equal(gradient[1], torch.zeros(4, dtype=torch.float64))
    assert gradient[[0, 2, 3]].all()


@pytest.mark.parametrize("form", ["gated", "gated_experts"])
@pytest.mark.parametrize("norm", NORMS)
def test_gradcheck(form, norm):
    arguments = make_arguments(form, order=4, shape=(4, 5))
    names = [n for n in ("x", "coefficients", "probs", "gate") if getattr(arguments, n) is not None]
    tensors = [getattr(arguments, name).requires_grad_() for name in names]

    def call(*tensors):
        keywords = dict(zip(names, tensors, strict=True))
        keywords |= {"norm": norm, "offsets": arguments.offsets, "backend": "reference"}
        return polynorm(keywords.pop("x"), keywords.pop("coefficients"), **keywords)

    torch.autograd.gradcheck(call, tensors)


def test_second_derivative_is_refused():
    arguments = make_arguments("plain")
    x = arguments.x.requires_grad_()
    y = polynorm(x, arguments.coefficients, backend="reference")
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiated once"):
        gradient.sum().backward()


def test_zeros_give_the_constant_term():
    x = torch.zeros(3, 8, requires_grad=True)
    y = polynorm(x, torch.tensor([0.5, 1.0, 1.0, 1.0]), backend="reference")
    y.sum().backward()
    assert torch.equal(y, torch.full_like(y, 0.5))
    torch.testing.assert_close(x.grad, torch.full_like(x, 1e3))  # a1 / sqrt(eps)


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e4])
def test_single_precision_at_every_scale(scale):
    arguments = make_arguments("gated_experts", shape=(16, 1536))
    arguments.x *= scale
    single = arguments.to(torch.float32)
    expected = single.to(torch.float64).run(polynorm_definition)
    assert_close(single.run(polynorm, backend="reference"), expected, 1e-5)


@pytest.mark.parametrize("width", WIDTHS[2:])
def test_bfloat16_is_the_exact_answer_rounded(width):
    """The root-mean-square error is within 5 % of that of rounding the exact answer."""
    arguments = make_arguments("gated", shape=(8, width))
    half = arguments.to(torch.bfloat16)
    half.coefficients = arguments.coefficients.float()
    exact = half.to(torch.float64).run(polynorm_definition)
    actual = half.run(polynorm, backend="reference")
    assert actual["coefficients"].dtype == torch.float32
    for name in ("output", "x", "gate"):
        assert actual[name].dtype == torch.bfloat16
        error = (actual[name].double() - exact[name]).square().mean().sqrt()
        rounding = (exact[name].bfloat16().double() - exact[name]).square().mean().sqrt()
        assert error <= 1.05 * rounding, name
    assert_close(
        {"coefficients": actual["coefficients"]}, {"coefficients": exact["coefficients"]}, 1e-4
    )


@pytest.mark.skipif(compiler_missing("cpu") is not None, reason="no C++ compiler")
@pytest.mark.parametrize("form", ["plain", "gated_experts"])
def test_compiled_equals_definition_for_any_number_of_rows(form):
    for rows in (10, 37, 1):
        arguments = make_arguments(form, shape=(rows, 24)).to(torch.float32)
        expected = arguments.to(torch.float64).run(polynorm_definition)
        stance = "default" if rows == 10 else "fail_on_recompile"
        with torch.compiler.set_stance(stance):
            assert_close(arguments.run(polynorm, backend="compiled"), expected, 1e-5)


REFUSED = {
    "x": ({"x": torch.ones(())}, "last dimension"),
    "width": ({"x": torch.ones(3, 0)}, "last dimension"),
    "scalar coefficients": ({"coefficients": torch.ones(())}, "coefficients"),
    "two sets without offsets": ({"coefficients": torch.ones(2, 4)}, "offsets"),
    "one set with offsets": ({"offsets": torch.tensor([0, 3])}, "offsets"),
    "offsets of other experts": (
        {"coefficients": torch.ones(2, 4), "offsets": torch.tensor([0, 3])},
        "one more entry",
    ),
    "probs": ({"probs": torch.ones(2)}, "probs"),
    "gate": ({"gate": torch.ones(3, 4)}, "gate"),
    "gate of another dtype": ({"gate": torch.ones(3, 8).half()}, "dtype of `x`"),
    "integers": ({"x": torch.ones(3, 8, dtype=torch.int32)}, "convert it"),
    "integer probs": ({"probs": torch.ones(3, dtype=torch.int64)}, "`probs` must be fp64"),
    "order": ({"coefficients": torch.ones(6)}, "order in"),
    "offsets that are no integers": (
        {"coefficients": torch.ones(1, 4), "offsets": torch.tensor([0.0, 3.0])},
        "`offsets` must be int32",
    ),
    "another device": ({"coefficients": torch.ones(4, device="meta")}, "one device"),
    "leading dimensions with offsets": (
        {
            "x": torch.ones(2, 3, 8),
            "coefficients": torch.ones(1, 4),
            "offsets": torch.tensor([0, 3]),
        },
        "rows, width",
    ),
}


@pytest.mark.parametrize(("changes", "word"), REFUSED.values(), ids=REFUSED)
def test_shapes_that_do_not_fit(changes, word):
    arguments = {"x": torch.ones(3, 8), "coefficients": torch.ones(4)} | changes
    with pytest.raises(ShapeError, match=word):
        polynorm(arguments.pop("x"), arguments.pop("coefficients"), **arguments)


@pytest.mark.parametrize(
    ("options", "word"),
    [({"norm": "RMS"}, "rms or l2"), ({"eps": 0.0}, "1e-30"), ({"eps": float("nan")}, "1e-30")],
)
def test_options_that_are_none(options, word):
    with pytest.raises(ValueError, match=word):
        polynorm(torch.ones(3, 8), torch.ones(4), **options)
