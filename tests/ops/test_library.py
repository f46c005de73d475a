"""The operators as torch sees them: registration, tracing, saved tensors, derivatives, imports."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from definitions import make_arguments
from torch.utils.checkpoint import checkpoint

from megapoly.ops import polynorm, polynorm_registration, polyrelu, save_row_statistics
from megapoly.ops.backends import compiler_missing
from megapoly.ops.collectives import NUM_SEGMENTS, PendingSum
from megapoly.testing import run_on_ranks

OPERATORS = {"polynorm": polynorm, "polyrelu": polyrelu}
FORMS = ["plain", "gated", "experts", "gated_experts"]
EPS, ROWS, WIDTH, ORDER = 1e-6, 5, 8, 3
LAYOUT = ("", False, "reference")


def fp32(form, *, requires_grad=False):
    arguments = make_arguments(form, order=ORDER, shape=(ROWS, WIDTH)).to(torch.float32)
    if requires_grad:
        for name in ("x", "coefficients", "slope", "probs", "gate"):
            if getattr(arguments, name) is not None:
                getattr(arguments, name).requires_grad_()
    return arguments


def polynorm_calls(form):
    """Name and arguments of each of PolyNorm's operators."""
    layout = (WIDTH, *LAYOUT)
    plain, leaves = fp32(form), fp32(form, requires_grad=True)
    rsqrt = torch.ops.megapoly.polynorm_rsqrt(plain.x, ORDER, EPS, *layout)
    yield "polynorm_rsqrt", (plain.x, ORDER, EPS, *layout)
    yield "polynorm_rsqrt", (plain.x, ORDER, EPS, WIDTH, "", True, "reference")
    rows = (leaves.coefficients, leaves.probs, leaves.gate, leaves.offsets)
    yield "polynorm_forward", (leaves.x, *rows, EPS, WIDTH, "reference")
    yield "polynorm_evaluate", (leaves.x, rsqrt, *rows, *layout)
    rows = (plain.coefficients, plain.probs, plain.gate, plain.offsets)
    yield "polynorm_backward", (plain.grad_output, plain.x, rsqrt, *rows, *layout)
    halves = torch.cat([plain.x, plain.x], dim=-1).chunk(2, dim=-1)
    yield "polynorm_backward", (plain.grad_output, halves[1], rsqrt, *rows, *layout)


def polyrelu_calls(form):
    """Name and arguments of each of PolyReLU's operators."""
    plain, leaves = fp32(form), fp32(form, requires_grad=True)
    rows = (leaves.coefficients, leaves.slope, leaves.probs, leaves.gate, leaves.offsets)
    yield "polyrelu_forward", (leaves.x, *rows, *LAYOUT)
    rows = (plain.coefficients, plain.slope, plain.probs, plain.gate, plain.offsets)
    yield "polyrelu_backward", (plain.grad_output, plain.x, *rows, *LAYOUT)
    yield "polyrelu_backward", (plain.grad_output, plain.x, *rows, "", True, "reference")


CALLS = {
    f"{name}-{form}-{number}": (name, args)
    for calls, forms in (
        (polynorm_calls, ["plain", "gated_experts"]),
        (polyrelu_calls, ["plain", "gated_experts", "prelu_experts"]),
    )
    for form in forms
    for number, (name, args) in enumerate(calls(form))
}


@pytest.mark.parametrize(("name", "args"), CALLS.values(), ids=CALLS)
def test_registration(name, args):
    """Schema, fake tensors, gradient and dynamic shapes, as torch checks them."""
    torch.library.opcheck(getattr(torch.ops.megapoly, name).default, args)


def test_every_operator_is_checked():
    registered = {
        name.split("::")[1]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("megapoly::")
    }
    assert registered == {name for name, _ in CALLS.values()}


def ffn(operator, backend):
    def call(x, weight, coefficients):
        return operator(x @ weight, coefficients, backend=backend) @ weight.T

    return call


def value_and_gradients(function, *tensors):
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output.square().sum(), leaves)]


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
def test_one_graph_without_recompilation_for_other_numbers_of_rows(operator, fresh_dynamo):
    function = ffn(operator, "reference")
    traced = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    parameters = torch.randn(6, 10), torch.randn(4)
    for rows, stance in ((9, "default"), (23, "fail_on_recompile"), (500, "fail_on_recompile")):
        x = torch.randn(rows, 6)
        expected = value_and_gradients(function, x, *parameters)
        with torch.compiler.set_stance(stance):
            actual = value_and_gradients(traced, x, *parameters)
        torch.testing.assert_close(actual, expected)


@pytest.mark.skipif(compiler_missing("cpu") is not None, reason="no C++ compiler")
def test_compiled_backend_inside_a_compiled_function(fresh_dynamo):
    traced = torch.compile(ffn(polyrelu, "compiled"), fullgraph=True, backend="aot_eager")
    tensors = torch.randn(9, 6), torch.randn(6, 10), torch.randn(4)
    expected = value_and_gradients(ffn(polyrelu, "reference"), *tensors)
    torch.testing.assert_close(value_and_gradients(traced, *tensors), expected)


def saved_bytes(operator, arguments, **options):
    """What is saved for the backward pass: names of arguments, and the bytes of all else."""
    given = {
        name: tensor.requires_grad_(tensor.is_floating_point())
        for name, tensor in vars(arguments).items()
        if tensor is not None and name != "grad_output"
    }
    names = {tensor.untyped_storage().data_ptr(): name for name, tensor in given.items()}
    saved, kept = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor)  # another one must not get its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = operator(given.pop("x"), given.pop("coefficients"), **given, **options)
    assert output.requires_grad
    others = sum(size for pointer, size in saved.items() if pointer not in names)
    return {names[pointer] for pointer in saved if pointer in names}, others


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("deterministic", [False, True])
def test_polynorm_saves_its_arguments_and_order_fp32_numbers_a_row(form, dtype, deterministic):
    arguments = make_arguments(form, order=ORDER, shape=(32, 48)).to(dtype)
    given = {name for name, tensor in vars(arguments).items() if tensor is not None}
    names, others = saved_bytes(
        polynorm, arguments, backend="reference", deterministic=deterministic
    )
    assert names == given - {"grad_output"}
    assert others == 32 * ORDER * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("form", [*FORMS, "prelu_experts"])
def test_polyrelu_saves_its_arguments_alone(form, dtype):
    arguments = make_arguments(form, order=ORDER, shape=(32, 48)).to(dtype)
    given = {name for name, tensor in vars(arguments).items() if tensor is not None}
    names, others = saved_bytes(polyrelu, arguments, backend="reference")
    assert names == given - {"grad_output"}
    assert others == 0


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
@pytest.mark.parametrize("wanted", ["x", "coefficients", "probs", "gate"])
def test_second_derivative_is_refused(operator, wanted, deterministic):
    arguments = fp32("gated_experts", requires_grad=True)
    y = operator(
        arguments.x,
        arguments.coefficients,
        probs=arguments.probs,
        gate=arguments.gate,
        offsets=arguments.offsets,
        deterministic=deterministic,
        backend="reference",
    )
    leaf = getattr(arguments, wanted)
    (gradient,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiated once"):
        gradient.sum().backward()


RUN_WITH_TORCH_ALONE = """
import sys
for name in ("megatron", "triton", "jsonargparse", "transformer_engine", "yaml", "transformers",
             "tensorboard", "rich", "psutil", "tokenizers", "huggingface_hub"):
    sys.modules[name] = None
import torch
from megapoly import PolyNorm, PolyReLU
from megapoly.activations import ACTIVATIONS
from megapoly.ops import polynorm, polyrelu
x = torch.ones(3, 8, requires_grad=True)
for operator in (polynorm, polyrelu):
    operator(x, torch.ones(4), backend="reference").sum().backward()
for module in (PolyNorm(backend="reference"), PolyReLU(slope=0.25, backend="reference")):
    module(x).sum().backward()
    assert module.coefficients.grad.any()
print([name for name in sys.modules if name.startswith("megapoly.") and not name.startswith(
       ("megapoly.ops", "megapoly.activations", "megapoly.errors", "megapoly.polynomial"))])
"""


def test_operators_modules_and_registry_need_torch_alone():
    result = subprocess.run(
        [sys.executable, "-c", RUN_WITH_TORCH_ALONE], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["[]"]


def record(events):
    """Write down collectives (name, numbers, asynchronous), waits, and pointwise evaluations."""

    def recording(name, function, describe=lambda *args, **kwargs: ()):
        def call(*args, **kwargs):
            events.append((name, *describe(*args, **kwargs)))
            return function(*args, **kwargs)

        return call

    def of_collective(*tensors, async_op=False, **kwargs):
        return tensors[-1].numel(), async_op

    for name in ("all_reduce", "all_gather_into_tensor"):
        setattr(dist, name, recording(name, getattr(dist, name), of_collective))
    PendingSum.wait = recording("wait", PendingSum.wait)
    reference = polynorm_registration.functions_for("reference", torch.ones(1, 1))
    recorded = dataclasses.replace(reference, evaluate=recording("evaluate", reference.evaluate))
    polynorm_registration.functions_for = lambda backend, x: recorded


def calls_and_recomputation():
    """Events of each operator's two passes; gradients and events of recomputed activations."""
    dist.init_process_group("gloo")
    events: list[tuple] = []
    record(events)

    def taken():
        taken = list(events)
        events.clear()
        return taken

    try:
        passes = {}
        for name, operator in OPERATORS.items():
            for split, deterministic in ((True, False), (True, True), (False, False)):
                group = dist.group.WORLD if split else None
                x, gate = torch.randn(2, ROWS, WIDTH, requires_grad=True)
                coefficients = torch.ones(ORDER + 1, requires_grad=True)
                options = {"group": group, "deterministic": deterministic, "backend": "reference"}
                y = operator(x, coefficients, gate=gate, **options)
                forward = taken()
                y.sum().backward()
                passes[name, split, deterministic] = forward, taken()
        recomputed = {}
        for way, options in RECOMPUTATION.items():
            gradients = recomputed_gradients(options)
            recomputed[way] = gradients, taken()
        return passes, recomputed
    finally:
        dist.destroy_process_group()


RECOMPUTATION = {
    "nothing": None,
    "everything": {},
    "all but statistics": {"context_fn": save_row_statistics},
}


def recomputed_gradients(options):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, ROWS, ROWS, generator=generator)
    coefficients = torch.ones(ORDER + 1)
    leaves = [tensor.requires_grad_() for tensor in (x, weight, coefficients)]

    def ffn(x):
        return polynorm(x @ weight, coefficients, group=dist.group.WORLD, backend="reference")

    y = ffn(x) if options is None else checkpoint(ffn, x, use_reentrant=False, **options)
    return torch.autograd.grad(y.square().sum(), leaves)


@pytest.fixture(scope="module")
def on_two_ranks():
    return run_on_ranks(calls_and_recomputation, 2)


def test_collectives_of_polynorm(on_two_ranks):
    """One each way; the gate's gradient is computed while the backward sum is under way."""
    for passes, _ in on_two_ranks:
        assert passes["polynorm", True, False] == (
            [("all_reduce", ROWS * ORDER, True), ("wait",), ("evaluate",)],
            [("all_reduce", ROWS * (ORDER + 1), True), ("evaluate",), ("wait",)],
        )
        of_segments = NUM_SEGMENTS // 2 * ROWS
        assert passes["polynorm", True, True] == (
            [("all_gather_into_tensor", of_segments * ORDER, True), ("wait",), ("evaluate",)],
            [("all_gather_into_tensor", of_segments * (ORDER + 1), True), ("evaluate",), ("wait",)],
        )


def test_collectives_of_polyrelu(on_two_ranks):
    """None forward, one backward."""
    for passes, _ in on_two_ranks:
        segments, sums = NUM_SEGMENTS // 2, ORDER + 1
        assert passes["polyrelu", True, False] == ([], [("all_reduce", sums, True), ("wait",)])
        assert passes["polyrelu", True, True] == (
            [],
            [("all_gather_into_tensor", segments * sums, True), ("wait",)],
        )


def test_no_collective_where_rows_are_whole(on_two_ranks):
    for passes, _ in on_two_ranks:
        for name in OPERATORS:
            assert {event for both in passes[name, False, False] for event, *_ in both} <= {"wait"}


def test_recomputation_keeps_the_statistics(on_two_ranks):
    for _, recomputed in on_two_ranks:
        collectives = {
            way: [numbers for name, *numbers in events if name == "all_reduce"]
            for way, (_, events) in recomputed.items()
        }
        forward, backward = [ROWS * ORDER, True], [ROWS * (ORDER + 1), True]
        assert collectives == {
            "nothing": [forward, backward],
            "everything": [forward, forward, backward],
            "all but statistics": [forward, backward],
        }
        evaluations = {
            way: sum(name == "evaluate" for name, *_ in events)
            for way, (_, events) in recomputed.items()
        }
        assert evaluations == {"nothing": 1, "everything": 2, "all but statistics": 2}


def test_recomputation_changes_no_bit_of_the_gradients(on_two_ranks):
    for _, recomputed in on_two_ranks:
        expected, _ = recomputed["nothing"]
        for gradients, _ in recomputed.values():
            assert all(map(torch.equal, gradients, expected))
