"""Triton kernels against definitions in float64: on a GPU, or interpreted where there is none."""

from __future__ import annotations

from dataclasses import fields, replace

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
from torch import Tensor

from megapoly.errors import UnavailableError
from megapoly.ops import polynorm, polyrelu
from megapoly.ops.polynorm_registration import functions_for
from megapoly.ops.triton import host, tile_sizes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("fresh_memory_is_nan", "interpreter_rounds_like_a_gpu"),
    # Of the interpreter, which computes with NumPy: the kernels count on IEEE infinities and NaN.
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning"),
]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
on_gpu_only = pytest.mark.skipif(DEVICE.type != "cuda", reason="no CUDA device")

OPERATORS = {"polynorm": polynorm, "polyrelu": polyrelu}
DEFINITIONS = {"polynorm": polynorm_definition, "polyrelu": polyrelu_definition}
EVERY_FORM = [("polynorm", form) for form in POLYNORM_FORMS] + [("polyrelu", f) for f in FORMS]
HALVES = (torch.bfloat16, torch.float16)
LARGE = {"rows": 10_000, "width": 11008, "expert_rows": 8192, "expert_width": 1536}


@pytest.fixture(params=["whole", "blocks"])
def tiles(request, monkeypatch):
    """Rows in one program's registers, or gone over in blocks as rows longer than that are."""
    if request.param == "blocks":
        cut_into_blocks(monkeypatch, tile_sizes._LIMITS)


def cut_into_blocks(monkeypatch, kernels):
    limits = dict.fromkeys(kernels, tile_sizes.Limits(lanes_per_warp=256, max_lanes=0))
    monkeypatch.setattr(tile_sizes, "_LIMITS", tile_sizes._LIMITS | limits)
    monkeypatch.setattr(tile_sizes, "MAX_BLOCK_OF_LOOP", 32)


def arguments_of(operator, form, dtype=torch.float32, **options) -> Arguments:
    """On the device; coefficients and slope are parameters, so fp32."""
    arguments = make_arguments(form, **options)
    tensors = {f.name: getattr(arguments, f.name) for f in fields(arguments)}
    if operator == "polyrelu" and form == "gated_experts":
        tensors["slope"] = make_arguments("prelu_experts").slope
    for name, tensor in tensors.items():
        if tensor is not None and name != "offsets":
            tensor = tensor.to(torch.float32 if name in ("coefficients", "slope") else dtype)
        tensors[name] = None if tensor is None else tensor.to(DEVICE)
    return Arguments(**tensors)


def run(operator, arguments, **options) -> dict[str, Tensor]:
    return arguments.run(OPERATORS[operator], backend="triton", **options)


def exact(operator, arguments, **options) -> dict[str, Tensor]:
    with DEVICE:
        return arguments.to(torch.float64).run(DEFINITIONS[operator], **options)


def assert_precise(actual, expected, of_parameters=1e-6):
    """fp32: close to the largest entry; halves: as the exact answer rounded, but for 5 %."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].shape == tensor.shape, name
        error = actual[name].double() - tensor
        if actual[name].dtype == torch.float32:
            tolerance = of_parameters if name in ("coefficients", "slope") else 1e-6
            error, allowed = error.abs().max(), tolerance * tensor.abs().max()
        else:
            rounding = tensor.to(actual[name].dtype).double() - tensor
            error, allowed = error.square().mean().sqrt(), 1.05 * rounding.square().mean().sqrt()
        assert error <= allowed, f"{name}: {error} instead of {allowed}"


def assert_every_row_precise(actual, expected):
    """Of output and gradient of x, however different in size the rows are."""
    for row in range(len(expected["output"])):
        assert_precise(
            {name: actual[name][row] for name in ("output", "x")},
            {name: expected[name][row] for name in ("output", "x")},
        )


def assert_same_bits(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize(("operator", "form"), EVERY_FORM)
def test_every_form(operator, form, tiles):
    arguments = arguments_of(operator, form, shape=(4, 123))
    assert_precise(run(operator, arguments), exact(operator, arguments))


@pytest.mark.parametrize("order", [2, 4])
@pytest.mark.parametrize("operator", OPERATORS)
def test_other_orders(operator, order, tiles):
    arguments = arguments_of(operator, "gated_experts", order=order, shape=(3, 129))
    assert_precise(run(operator, arguments), exact(operator, arguments))


@pytest.mark.parametrize("width", [1, 2, 123, 129, 1536])
@pytest.mark.parametrize("operator", OPERATORS)
def test_every_width(operator, width):
    # A large eps: without it the gradient of a row of one element is almost nothing.
    options = {"eps": 0.5} if operator == "polynorm" else {}
    arguments = arguments_of(operator, "gated", shape=(2, width))
    assert_precise(run(operator, arguments, **options), exact(operator, arguments, **options))


def test_l2_norm(tiles):
    arguments = arguments_of("polynorm", "routed", shape=(3, 129))
    assert_precise(run("polynorm", arguments, norm="l2"), exact("polynorm", arguments, norm="l2"))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("operator", OPERATORS)
def test_half_precision_is_the_exact_answer_rounded(operator, dtype, tiles):
    arguments = arguments_of(operator, "gated_experts", dtype, shape=(4, 129))
    # Parameters' gradients are sums whose terms cancel.
    assert_precise(run(operator, arguments), exact(operator, arguments), of_parameters=1e-5)


def test_coefficients_in_half_precision():
    arguments = arguments_of("polynorm", "experts", torch.bfloat16, shape=(3, 129))
    arguments.coefficients = arguments.coefficients.bfloat16()
    result = run("polynorm", arguments)
    assert result["coefficients"].dtype == torch.bfloat16
    assert_precise(result, exact("polynorm", arguments))


def test_row_that_only_the_backward_pass_cuts_into_blocks(monkeypatch):
    cut_into_blocks(monkeypatch, [key for key in tile_sizes._LIMITS if key[0] > 1])
    arguments = arguments_of("polynorm", "gated", shape=(3, 129))
    assert tile_sizes.whole_row_tiles(129, num_values=1, order=3)
    assert tile_sizes.whole_row_tiles(129, num_values=3, order=3) is None
    assert_precise(run("polynorm", arguments), exact("polynorm", arguments))


@pytest.mark.parametrize("eps", [1e-6, 1e6])
def test_rows_of_every_scale(eps, tiles):
    arguments = arguments_of("polynorm", "gated", shape=(5, 129))
    arguments.x *= torch.tensor([1e-20, 10.0, 1e3, 2e5, 1e30], device=DEVICE)[:, None]
    actual = run("polynorm", arguments, eps=eps)
    assert_every_row_precise(actual, exact("polynorm", arguments, eps=eps))


def test_rows_with_elements_as_large_as_bfloat16_holds(tiles):
    arguments = arguments_of("polynorm", "plain", torch.bfloat16, shape=(6, 129))
    x = arguments.x
    x[1, 128] = 3e38
    x[2] = 3e38
    x[3] = 3e38 * x[3].sign()
    x[4, ::2] *= 1e38
    x[5, ::2] *= 1e-30
    actual, expected = run("polynorm", arguments), exact("polynorm", arguments)
    assert_every_row_precise(actual, expected)
    assert_precise(
        {"coefficients": actual["coefficients"]}, {"coefficients": expected["coefficients"]}
    )


@pytest.mark.parametrize("operator", OPERATORS)
def test_zeros(operator, tiles):
    arguments = arguments_of(operator, "routed", shape=(2, 129))
    arguments.x.zero_()
    result = run(operator, arguments)
    constant = arguments.probs[:, None] * arguments.coefficients[0]
    assert torch.equal(result["output"], constant.expand_as(arguments.x))
    assert not result["coefficients"][1:].any()
    assert_precise(result, exact(operator, arguments))


@pytest.mark.parametrize("operator", OPERATORS)
def test_strided_arguments(operator, tiles):
    arguments = arguments_of(operator, "gated_experts", shape=(2, 129))
    gate_and_x = torch.cat([arguments.gate, arguments.x], dim=-1)
    gate, x = gate_and_x.chunk(2, dim=-1)
    strided = replace(
        arguments,
        gate=gate,
        x=x,
        grad_output=torch.cat([arguments.grad_output, x], dim=-1)[:, :129],
        coefficients=arguments.coefficients.t().contiguous().t(),
        probs=torch.stack([arguments.probs, arguments.probs + 1], dim=-1)[:, 0],
    )
    for name in ("x", "gate", "grad_output", "coefficients", "probs"):
        assert not getattr(strided, name).is_contiguous()
    assert_same_bits(run(operator, strided), run(operator, arguments))


@pytest.mark.parametrize("names", [("probs",), ()], ids=["probs", "no probs"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_padding_is_zero_whatever_it_holds(operator, names, tiles):
    arguments = arguments_of(operator, "gated_experts", shape=(3, 129))
    if "probs" not in names:
        arguments.probs = None
    by_row = ("x", "gate", "grad_output", *names)
    padded = replace(
        arguments,
        **{
            name: torch.cat([tensor, torch.full_like(tensor[:2], torch.nan)])
            for name in by_row
            for tensor in [getattr(arguments, name)]
        },
    )
    result = run(operator, padded)
    for name in ("output", "x", "gate", *names):
        assert torch.equal(result[name][3:], torch.zeros_like(result[name][3:])), name
        result[name] = result[name][:3]
    assert_precise(result, exact(operator, arguments))


@pytest.mark.parametrize("operator", OPERATORS)
def test_expert_without_rows_has_no_gradient(operator):
    result = run(operator, arguments_of(operator, "gated_experts", shape=(3, 8)))
    for name in {"coefficients", "slope"} & result.keys():
        assert torch.equal(result[name][1], torch.zeros_like(result[name][1])), name
        assert result[name][[0, 2, 3]].any(dim=-1).all()


def test_many_uneven_experts():
    generator = torch.Generator().manual_seed(0)
    sizes = torch.multinomial(torch.rand(64, generator=generator) ** 4, 30, True).bincount(
        minlength=64
    )
    arguments = arguments_of("polynorm", "routed", shape=(30, 8))
    arguments.coefficients = torch.randn(64, 4, generator=generator).to(DEVICE)
    arguments.offsets = torch.cat([torch.zeros(1), sizes.cumsum(0)]).int().to(DEVICE)
    assert sizes.max() > 2 and (sizes == 0).sum() > 32
    assert_precise(run("polynorm", arguments), exact("polynorm", arguments))


@pytest.mark.parametrize("form", ["plain", "gated_experts"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_no_rows(operator, form, tiles):
    arguments = arguments_of(operator, form, shape=(1, 129))
    for name in ("x", "gate", "probs", "grad_output"):
        if getattr(arguments, name) is not None:
            setattr(arguments, name, getattr(arguments, name)[:0])
    if arguments.offsets is not None:
        arguments.offsets.zero_()
    result = run(operator, arguments)
    assert result["output"].shape == result["x"].shape == (0, 129)
    for name in {"coefficients", "slope"} & result.keys():
        assert torch.equal(result[name], torch.zeros_like(result[name])), name


def test_coefficient_gradient_does_not_depend_on_other_experts_or_the_run(monkeypatch):
    monkeypatch.setattr(host, "CHUNK", 2)
    arguments = arguments_of("polynorm", "plain", shape=(9, 64))
    arguments.coefficients = arguments.coefficients.repeat(3, 1)
    arguments.offsets = torch.tensor([0, 3, 8, 9], dtype=torch.int32, device=DEVICE)
    result = run("polynorm", arguments)
    assert_same_bits(run("polynorm", arguments), result)
    alone = replace(
        arguments,
        x=arguments.x[3:8],
        grad_output=arguments.grad_output[3:8],
        coefficients=arguments.coefficients[1:2],
        offsets=torch.tensor([0, 5], dtype=torch.int32, device=DEVICE),
    )
    assert torch.equal(run("polynorm", alone)["coefficients"][0], result["coefficients"][1])


@pytest.mark.parametrize(("chunk", "chunks_at_a_time"), [(256, 128), (32, 4)])
def test_sum_over_more_rows_than_a_chunk(chunk, chunks_at_a_time, monkeypatch):
    monkeypatch.setattr(host, "CHUNK", chunk)
    monkeypatch.setattr(host, "_CHUNKS", chunks_at_a_time)
    terms = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    sums = host.sum_over_rows(terms, None, 1)
    assert_precise({"sums": sums}, {"sums": terms.double().sum(0, keepdim=True)})

    bounds = [0, 300, 300, 301, 900]  # then padding
    offsets = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
    sums = host.sum_over_rows(terms, offsets, 4)
    for index, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        expert = terms[begin:end].contiguous()
        assert_precise({"sums": sums[index]}, {"sums": expert.double().sum(0)})
        assert torch.equal(sums[index], host.sum_over_rows(expert, None, 1)[0])


def test_statistics_of_two_halves_of_a_row_add_up():
    arguments = arguments_of("polynorm", "gated", shape=(4, 130))
    x = arguments.x
    x[1] *= 1e5
    x[2, :65] *= 1e30
    x[3, 65:] *= 1e-10
    kernels = functions_for("triton", x)
    square_sums = kernels.square_sums(x, 4)
    exact_sums = torch.stack([(x.double() / 256).pow(2 * k).sum(-1) for k in (1, 2, 3, 4)], -1)
    torch.testing.assert_close(square_sums, exact_sums, rtol=1e-6, atol=0)
    halves = sum(kernels.square_sums(half, 4) for half in x.chunk(2, dim=-1))
    torch.testing.assert_close(halves, square_sums, rtol=1e-6, atol=0)

    rsqrt = kernels.rsqrt_of_square_sums(square_sums, 130, 1e-6, torch.float32)
    given = (arguments.grad_output, arguments.gate)
    sums = kernels.gradient_sums(x, rsqrt, *given)
    halves = sum(
        kernels.gradient_sums(half, rsqrt, grad_output, gate)
        for half, grad_output, gate in zip(*(t.chunk(2, -1) for t in (x, *given)), strict=True)
    )
    for row in range(4):
        assert_precise({"sums": halves[row]}, {"sums": sums[row].double()})


def test_deterministic():
    arguments = arguments_of("polynorm", "gated_experts", shape=(2, 72))
    result = run("polynorm", arguments, deterministic=True)
    assert_precise(result, exact("polynorm", arguments))
    assert_same_bits(run("polynorm", arguments, deterministic=True), result)


@pytest.mark.parametrize("options", [{}, {"deterministic": True}])
def test_double_precision_is_refused(options):
    x = torch.ones(2, 8, dtype=torch.float64, device=DEVICE)
    coefficients = torch.ones(4, device=DEVICE)
    with pytest.raises(UnavailableError, match="float64"):
        polynorm(x, coefficients, backend="triton", **options)
    with pytest.raises(UnavailableError, match="float64"):
        polyrelu(x, coefficients, backend="triton")


@on_gpu_only
@pytest.mark.parametrize("width", [1032, 1536, 8256, 11008, 16384, 16385, 40_000])
@pytest.mark.parametrize("operator", OPERATORS)
def test_large_width(operator, width):
    for order in (2, 3, 4):
        arguments = arguments_of(operator, "gated_experts", order=order, shape=(64, width))
        assert_precise(run(operator, arguments), exact(operator, arguments), of_parameters=1e-5)


@on_gpu_only
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("form", ["plain", "gated"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_many_wide_rows(operator, form, dtype):
    arguments = arguments_of(operator, form, dtype, shape=(LARGE["rows"], LARGE["width"]))
    result = run(operator, arguments)
    assert_same_bits(run(operator, arguments), result)
    # The definition keeps dozens of float64 tensors of this size.
    parts = [
        exact(operator, replace(arguments, x=x, grad_output=g, gate=gate))
        for x, g, gate in zip(
            arguments.x.split(500),
            arguments.grad_output.split(500),
            [None] * LARGE["rows"] if arguments.gate is None else arguments.gate.split(500),
            strict=False,
        )
    ]
    expected = {
        name: sum(part[name] for part in parts)
        if name == "coefficients"
        else torch.cat([part[name] for part in parts])
        for name in result
    }
    assert_precise(result, expected, of_parameters=1e-5)


@on_gpu_only
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("operator", OPERATORS)
def test_many_rows_of_64_experts(operator, dtype):
    rows, width = LARGE["expert_rows"], LARGE["expert_width"]
    arguments = arguments_of(operator, "gated_experts", dtype, shape=(rows, width))
    cuts = torch.rand(63, generator=torch.Generator().manual_seed(0)).square().sort().values
    bounds = [0, *(cuts * rows).int().tolist(), rows]
    arguments.offsets = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
    arguments.coefficients = arguments.coefficients.repeat(16, 1)
    if arguments.slope is not None:
        arguments.slope = arguments.slope.repeat(16, 1)
    result = run(operator, arguments)
    assert_same_bits(run(operator, arguments), result)
    assert_precise(result, exact(operator, arguments), of_parameters=1e-5)
