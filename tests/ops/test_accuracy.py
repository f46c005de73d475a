"""Output and every gradient against float64: precision, shapes, range, padding rows.

The limits are relative to the exact answer:

- bf16 and fp16: root-mean-square error at most 5 % above that of rounding the exact answer.
- fp32: largest error at most 1e-6 of the largest entry. Sums over a row or over all rows (gradients
  of coefficients, slope and probs) may cancel; their error is at most 5e-7 of the sum of their
  terms' magnitudes. The same holds for everything in rows of one or two columns, where a normalised
  value hardly depends on ``x``: its gradient is the small difference of two large numbers.

``compiled`` runs with few combinations of dtype and form: each costs seconds.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from definitions import (
    FORMS,
    POLYNORM_FORMS,
    Arguments,
    make_arguments,
    polynorm_definition,
    polyrelu_definition,
)

from megapoly.ops import polynorm, polyrelu
from megapoly.ops.backends import compiler_missing

OPERATORS = {
    "polynorm": (polynorm, polynorm_definition),
    "polyrelu": (polyrelu, polyrelu_definition),
}
CASES = [("polynorm", form) for form in POLYNORM_FORMS] + [("polyrelu", form) for form in FORMS]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LIMIT_OF_ROUNDING = 1.05
LIMIT_IN_FP32 = 1e-6
LIMIT_OF_TERMS = 5e-7

# 10^4 rows of 11008 would take minutes in float64: the many rows have a small width.
SHAPES = [(7, width) for width in (1, 2, 123, 129, 1536, 8256, 11008)]
SHAPES += [(0, 24), (1, 24), (10_000, 24)]
# torch.compile makes other code above a width of 4096, and where sizes are equal by chance in the
# first call: that is no row of two columns, whose stride would be the number of coefficients.
COMPILED_SHAPES = [
    ("polynorm", "gated_experts", [(7, 123), (7, 2), (7, 129), (7, 1536), (10_000, 24)]),
    ("polynorm", "plain", [(7, 8256), (7, 11008)]),
    ("polyrelu", "gated_experts", [(7, 123), (7, 2), (7, 129), (7, 1536), (10_000, 24)]),
]

needs_compiler = pytest.mark.skipif(compiler_missing("cpu") is not None, reason="no C++ compiler")
on_both_backends = pytest.mark.parametrize(
    "backend", ["reference", pytest.param("compiled", marks=needs_compiler)]
)


def in_dtype(arguments: Arguments, dtype: torch.dtype) -> Arguments:
    """Tensors in ``dtype``, parameters in fp32; x and gate are halves of one tensor, as of FC1."""
    result = arguments.to(dtype)
    result.coefficients = arguments.coefficients.float()
    if arguments.slope is not None:
        result.slope = arguments.slope.float()
    if arguments.gate is not None:
        result.x, result.gate = torch.cat([result.x, result.gate], dim=-1).chunk(2, dim=-1)
    return result


def arguments_of(form: str, shape: tuple[int, int], *, order: int = 3) -> Arguments:
    """As :func:`make_arguments`; no rows are possible."""
    if shape[0] > 0:
        return make_arguments(form, order=order, shape=shape)
    arguments = make_arguments(form, order=order, shape=(1, shape[1]))
    for name in ("x", "grad_output", "probs", "gate"):
        if getattr(arguments, name) is not None:
            setattr(arguments, name, getattr(arguments, name)[:0])
    if arguments.offsets is not None:
        arguments.offsets = torch.zeros_like(arguments.offsets)
    return arguments


def exact_and_magnitudes(operator, arguments, **options):
    """The definition in float64, and for each result the largest sum of its terms' magnitudes."""
    definition = OPERATORS[operator][1]
    double = arguments.to(torch.float64)
    terms = with_magnitudes(double, operator).run(definition, **options)
    if operator == "polynorm":
        # The gradient of x is a difference; neither part is above order |terms of y| |g| / |x|.
        order = double.coefficients.shape[-1] - 1
        terms["x"] = order * terms["output"] * double.grad_output / double.x.abs().clamp(min=1e-300)
    return double.run(definition, **options), {name: largest(t) for name, t in terms.items()}


def with_magnitudes(arguments: Arguments, operator: str) -> Arguments:
    """Arguments for which no sum cancels: each result is the sum of its terms' magnitudes."""
    changed = {
        field.name: getattr(arguments, field.name).abs()
        for field in dataclasses.fields(arguments)
        if getattr(arguments, field.name) is not None and field.name != "offsets"
    }
    if operator == "polyrelu":  # h = relu(x), or with a negative slope |slope| |x| below zero
        changed["x"] = arguments.x
        if arguments.slope is not None:
            changed["slope"] = -arguments.slope.abs()
    return dataclasses.replace(arguments, **changed)


def largest(tensor: torch.Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0


def assert_accurate(operator, arguments, backend, *, by_row=False, **options):
    """Every result within the limits; ``by_row``: each row of x, gate and output on its own."""
    exact, magnitudes = exact_and_magnitudes(operator, arguments, **options)
    actual = arguments.run(OPERATORS[operator][0], backend=backend, **options)
    assert actual.keys() == exact.keys()
    narrow = arguments.x.shape[-1] <= 2
    for name, tensor in exact.items():
        like = arguments.x if name == "output" else getattr(arguments, name)
        assert (actual[name].shape, actual[name].dtype) == (like.shape, like.dtype), name
        pointwise = name in ("output", "x", "gate")
        cancels = narrow or not pointwise
        pairs = zip(actual[name], tensor, strict=True) if by_row and pointwise else []
        for row, (got, expected) in enumerate(pairs or [(actual[name], tensor)]):
            label = f"{name}, row {row}" if pairs else name
            assert_within_limit(got, expected, magnitudes[name] if cancels else None, label)


def assert_within_limit(actual, exact, magnitude, label):
    error = actual.double() - exact
    if actual.dtype == torch.float32:
        limit = LIMIT_IN_FP32 * largest(exact)
        if magnitude is not None:
            limit = LIMIT_OF_TERMS * magnitude
        assert largest(error) <= limit, f"{label}: {largest(error)}, limit {limit}"
        return
    limit = LIMIT_OF_ROUNDING * root_mean_square(exact.to(actual.dtype).double() - exact)
    if magnitude is not None:
        limit += LIMIT_OF_TERMS * magnitude
    assert root_mean_square(error) <= limit, f"{label}: {root_mean_square(error)}, limit {limit}"


def root_mean_square(tensor: torch.Tensor) -> float:
    return tensor.square().mean().sqrt().item() if tensor.numel() else 0.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("operator", "form"), CASES)
def test_every_shape(operator, form, shape, dtype):
    assert_accurate(operator, in_dtype(arguments_of(form, shape), dtype), "reference")


@needs_compiler
@pytest.mark.parametrize(("operator", "form", "shapes"), COMPILED_SHAPES)
def test_every_shape_compiled(operator, form, shapes):
    for shape in shapes:
        arguments = in_dtype(arguments_of(form, shape), torch.bfloat16)
        assert_accurate(operator, arguments, "compiled")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", [2, 4])
@pytest.mark.parametrize(("operator", "form"), CASES)
def test_every_order(operator, form, order, dtype):
    arguments = in_dtype(arguments_of(form, (10, 129), order=order), dtype)
    assert_accurate(operator, arguments, "reference")
    if operator == "polynorm":
        assert_accurate(operator, arguments, "reference", norm="l2")


def random_signs(*size: int) -> torch.Tensor:
    """Numbers from 0.5 to 1 of either sign."""
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(2, *size, dtype=torch.float64, generator=generator)
    return (0.5 + 0.5 * uniform[0]) * torch.where(uniform[1] < 0.5, -1.0, 1.0)


def rows_of_sizes(
    form: str, sizes: tuple[float, ...], *, width: int = 129, order: int = 3
) -> Arguments:
    """Row i has |x| from sizes[i] / 2 to sizes[i]."""
    arguments = make_arguments(form, order=order, shape=(len(sizes), width))
    arguments.x = random_signs(len(sizes), width) * torch.tensor(sizes).double()[:, None]
    return arguments


SIZES = {
    torch.bfloat16: (3e38, 1e30, 1e19, 1e6, 1e3, 1e-3, 1e-20),
    torch.float16: (6.5e4, 1e3, 1.0, 1e-3, 1e-7),
    torch.float32: (3e38, 1e30, 1e19, 1e6, 1e3, 1e-3, 1e-20),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", POLYNORM_FORMS)
@pytest.mark.parametrize("width", [129, 8256])
def test_rows_of_every_size(form, width, dtype):
    arguments = in_dtype(rows_of_sizes(form, SIZES[dtype], width=width), dtype)
    assert_accurate("polynorm", arguments, "reference", by_row=True)


@needs_compiler
def test_rows_of_every_size_compiled():
    arguments = in_dtype(rows_of_sizes("gated_experts", SIZES[torch.bfloat16]), torch.bfloat16)
    assert_accurate("polynorm", arguments, "compiled", by_row=True)


@pytest.mark.parametrize("form", FORMS)
def test_polyrelu_rows_of_every_size(form):
    arguments = in_dtype(rows_of_sizes(form, (1e6, 1e3, 1e-3, 1e-20)), torch.bfloat16)
    assert_accurate("polyrelu", arguments, "reference", by_row=True)


def test_fourth_powers_of_the_largest_rows():
    """Their squares are not float64: eps is nothing here, so the definition runs on x 2^-100."""
    arguments = in_dtype(rows_of_sizes("plain", (3e38, 1e30), order=4), torch.bfloat16)
    scaled = arguments.to(torch.float64)
    scaled.x = scaled.x * 2.0**-100
    exact = scaled.run(polynorm_definition, eps=0.0)
    exact["x"] = exact["x"] * 2.0**-100
    actual = arguments.run(polynorm, backend="reference")
    for name in ("output", "x"):
        for row in range(2):
            assert_within_limit(actual[name][row], exact[name][row], None, f"{name}, row {row}")
    magnitudes = with_magnitudes(scaled, "polynorm").run(polynorm_definition)
    magnitude = largest(magnitudes["coefficients"])
    assert_within_limit(actual["coefficients"], exact["coefficients"], magnitude, "coefficients")


@on_both_backends
def test_one_huge_element(backend):
    arguments = make_arguments("gated_experts", shape=(10, 129))
    arguments.x[2, 77] = 3e38
    arguments.x[8, 0] = -3e38
    assert_accurate("polynorm", in_dtype(arguments, torch.bfloat16), backend, by_row=True)


@on_both_backends
@pytest.mark.parametrize("operator", OPERATORS)
def test_zeros(operator, backend):
    arguments = make_arguments("gated_experts", shape=(10, 129))
    arguments.x[::2] = 0.0
    arguments.gate[3:5] = 0.0
    arguments.grad_output[6:8] = 0.0
    assert_accurate(operator, in_dtype(arguments, torch.bfloat16), backend, by_row=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_transposed_and_sliced_tensors(operator, dtype):
    arguments = in_dtype(make_arguments("gated_experts", shape=(10, 129)), dtype)
    arguments.x = arguments.x.t().contiguous().t()
    arguments.probs = torch.stack([arguments.probs, arguments.probs], dim=-1)[:, 0]
    arguments.grad_output = torch.cat([arguments.grad_output] * 2, dim=-1)[:, :129]
    assert not any(
        tensor.is_contiguous()
        for tensor in (arguments.x, arguments.gate, arguments.probs, arguments.grad_output)
    )
    assert_accurate(operator, arguments, "reference")


ROWS_OF_EXPERTS = {
    "one": [7],
    "one of eight has all rows": [0, 0, 0, 9, 0, 0, 0, 0],
    "first and last empty": [0, 3, 1, 0, 4, 0],
    "64 uneven": [expert * 7 % 5 for expert in range(64)],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows_of_experts", ROWS_OF_EXPERTS.values(), ids=ROWS_OF_EXPERTS)
@pytest.mark.parametrize(
    ("operator", "form"), [("polynorm", "gated_experts"), ("polyrelu", "prelu_experts")]
)
def test_experts(operator, form, rows_of_experts, dtype):
    """The router's probabilities are fp32, whatever the dtype of the rows."""
    arguments = with_experts(form, rows_of_experts)
    probs = arguments.probs.float()
    arguments = in_dtype(arguments, dtype)
    arguments.probs = probs
    assert_accurate(operator, arguments, "reference")
    gradient = arguments.run(OPERATORS[operator][0], backend="reference")["coefficients"]
    assert gradient.any(dim=-1).tolist() == [rows > 0 for rows in rows_of_experts]


def with_experts(form: str, rows_of_experts: list[int]) -> Arguments:
    num_experts = len(rows_of_experts)
    arguments = make_arguments(form, shape=(sum(rows_of_experts), 123))
    generator = torch.Generator().manual_seed(1)
    arguments.coefficients = torch.randn(num_experts, 4, dtype=torch.double, generator=generator)
    if arguments.slope is not None:
        arguments.slope = torch.randn(num_experts, 1, dtype=torch.double, generator=generator)
    arguments.offsets = torch.tensor([0, *rows_of_experts]).cumsum(0).int()
    return arguments


@pytest.mark.parametrize(
    ("operator", "form", "backend"),
    [
        ("polynorm", "gated_experts", "reference"),
        ("polyrelu", "gated_experts", "reference"),
        ("polyrelu", "prelu_experts", "reference"),
        pytest.param("polynorm", "gated_experts", "compiled", marks=needs_compiler),
        pytest.param("polyrelu", "gated_experts", "compiled", marks=needs_compiler),
    ],
)
def test_padding_rows_are_zero_and_change_no_bit_elsewhere(operator, form, backend):
    rows, values = 10, (torch.nan, torch.inf, -torch.inf)
    longer = make_arguments(form, shape=(rows + len(values), 123))
    longer.offsets = make_arguments(form, shape=(rows, 123)).offsets
    of_rows = {
        name: getattr(longer, name)
        for name in ("x", "grad_output", "probs", "gate")
        if getattr(longer, name) is not None
    }
    shorter = {name: tensor[:rows] for name, tensor in of_rows.items()}
    whole = in_dtype(dataclasses.replace(longer, **shorter), torch.bfloat16)
    for tensor in of_rows.values():
        for row, value in enumerate(values, start=rows):
            tensor[row] = value
    padded = in_dtype(longer, torch.bfloat16)
    expected = whole.run(OPERATORS[operator][0], backend=backend)
    actual = padded.run(OPERATORS[operator][0], backend=backend)
    for name, tensor in actual.items():
        if name in ("coefficients", "slope"):
            assert torch.equal(tensor, expected[name]), name
        else:
            assert torch.equal(tensor[:rows], expected[name]), name
            assert torch.equal(tensor[rows:], torch.zeros_like(tensor[rows:])), name


def unscaled_polynorm(x, coefficients, grad_output, eps):
    """The closed form in plain fp32: output, gradients of x and of coefficients."""
    order, width = coefficients.shape[-1] - 1, x.shape[-1]
    square = x * x
    squares, products = [square], [grad_output]
    for _ in range(order):
        squares.append(squares[-1] * square)
        products.append(products[-1] * x)
    mean_squares = torch.stack([s.sum(-1) for s in squares[:order]], dim=-1).double() / width
    r = (mean_squares + eps).rsqrt().float()
    sums = torch.stack([p.sum(-1) for p in products], dim=-1)
    terms = torch.cat([sums[:, :1], r * sums[:, 1:]], dim=-1)
    direct = torch.arange(1.0, order + 1) * coefficients[1:] * r
    through_norm = direct * r * terms[:, 1:] / width
    constants = torch.cat([coefficients[:1].expand(len(x), 1), coefficients[1:] * r], dim=-1)
    gradient = grad_output * polynomial(x, direct) - x * polynomial(square, through_norm)
    return polynomial(x, constants), gradient, terms.double().sum(0).float()


def polynomial(x, constants):
    y = constants[:, -1:]
    for constant in constants.flip(-1)[:, 1:].split(1, dim=-1):
        y = y * x + constant
    return y


@pytest.mark.parametrize("order", [2, 3, 4])
def test_scaling_of_rows_changes_no_bit_where_nothing_overflows(order):
    sizes = (0.03, 1.0, 20.0, 300.0, 3000.0)
    arguments = rows_of_sizes("plain", sizes, width=1536, order=order).to(torch.float32)
    actual = arguments.run(polynorm, backend="reference", eps=1e-3)
    expected = unscaled_polynorm(
        arguments.x, arguments.coefficients, arguments.grad_output, eps=1e-3
    )
    for name, tensor in zip(("output", "x", "coefficients"), expected, strict=True):
        assert torch.equal(actual[name], tensor), name
