"""The operators under ``torch.func`` and forward-mode differentiation, and with DTensors."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist
from definitions import make_arguments, polynorm_definition, polyrelu_definition
from torch.autograd import forward_ad
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vjp, vmap

from megapoly import PolyNorm, PolyReLU
from megapoly.errors import ShapeError
from megapoly.ops import polynorm, polyrelu
from megapoly.testing import run_on_ranks

OPERATORS = {
    "polynorm": (polynorm, polynorm_definition),
    "polynorm, deterministic": (
        functools.partial(polynorm, deterministic=True),
        polynorm_definition,
    ),
    "polyrelu": (polyrelu, polyrelu_definition),
}
FORMS = ["plain", "gated", "experts", "gated_experts"]
ROWS, WIDTH, ORDER = 5, 16, 3
# Rows of experts are not batched: `offsets` say where each expert begins.
DENSE = ["plain", "gated"]


def double(form):
    """Arguments of one call: differentiable ones by name, and the others."""
    arguments = make_arguments(form, order=ORDER, shape=(ROWS, WIDTH)).to(torch.float64)
    names = ("x", "coefficients", "probs", "gate")
    given = {name: getattr(arguments, name) for name in names}
    return {n: t for n, t in given.items() if t is not None}, {"offsets": arguments.offsets}


def loss(function, others, leaves):
    y = function(leaves["x"], leaves["coefficients"], **rest(leaves), **others)
    return (y * torch.linspace(0.5, 2.0, WIDTH, dtype=y.dtype)).square().sum()


def rest(leaves):
    return {name: leaves[name] for name in ("probs", "gate") if name in leaves}


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", OPERATORS)
def test_grad_and_vjp_of_every_argument(name, form):
    operator, definition = OPERATORS[name]
    leaves, others = double(form)
    operator = functools.partial(operator, backend="reference")
    expected = grad(functools.partial(loss, definition, others))(leaves)
    close(grad(functools.partial(loss, operator, others))(leaves), expected)
    value, pull_back = vjp(functools.partial(loss, operator, others), leaves)
    close(value, loss(definition, others, leaves))
    close(pull_back(torch.ones_like(value))[0], expected)


@pytest.mark.parametrize("name", OPERATORS)
def test_jacobian(name):
    operator, definition = OPERATORS[name]
    leaves, others = double("gated")

    def of_x(function, x):
        return function(x, leaves["coefficients"], gate=leaves["gate"], **others)

    actual = jacrev(functools.partial(of_x, functools.partial(operator, backend="reference")))
    close(actual(leaves["x"]), jacrev(functools.partial(of_x, definition))(leaves["x"]))


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # a call for each sample
@pytest.mark.parametrize("form", DENSE)
@pytest.mark.parametrize("name", OPERATORS)
def test_gradients_of_each_sample_and_of_batched_calls(name, form):
    operator, definition = OPERATORS[name]
    operator = functools.partial(operator, backend="reference")
    leaves, others = double(form)
    stacks = {n: torch.stack([t, 0.5 * t, -t]) for n, t in leaves.items()}
    each = vmap(grad(functools.partial(loss, operator, others)))(stacks)
    sums = grad(lambda all_: vmap(functools.partial(loss, operator, others))(all_).sum())(stacks)
    for i in range(3):
        sample = {n: t[i] for n, t in stacks.items()}
        expected = grad(functools.partial(loss, definition, others))(sample)
        close({n: t[i] for n, t in each.items()}, expected)
        close({n: t[i] for n, t in sums.items()}, expected)


@pytest.mark.parametrize("backend", ["reference", "compiled"])
@pytest.mark.parametrize("kind", [PolyNorm, PolyReLU])
def test_functional_call_of_a_module(kind, backend):
    module = kind(backend=backend)
    leaves, _ = double("plain")
    x = leaves["x"].float()
    parameters = {n: p.detach() for n, p in module.named_parameters()}
    actual = grad(lambda given: functional_call(module, given, (x,)).square().sum())(parameters)
    module(x).square().sum().backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(actual[name], parameter.grad)


def calls():
    """Every registered operator, with arguments."""
    leaves, _ = double("gated")
    x, a, gate = leaves["x"], leaves["coefficients"], leaves["gate"]
    ops, layout = torch.ops.megapoly, (WIDTH, "", False, "reference")
    rsqrt = ops.polynorm_rsqrt(x, ORDER, 1e-6, *layout)
    yield ops.polynorm_rsqrt, lambda x: ops.polynorm_rsqrt(x, ORDER, 1e-6, *layout)
    rows = (a, None, gate, None)
    yield ops.polynorm_forward, lambda x: ops.polynorm_forward(x, *rows, 1e-6, WIDTH, "reference")
    yield ops.polynorm_evaluate, lambda x: ops.polynorm_evaluate(x, rsqrt, *rows, *layout)
    yield ops.polynorm_backward, lambda x: ops.polynorm_backward(x, x, rsqrt, *rows, *layout)
    with_slope = (a, None, None, gate, None)
    yield ops.polyrelu_forward, lambda x: ops.polyrelu_forward(x, *with_slope, *layout[1:])
    yield ops.polyrelu_backward, lambda x: ops.polyrelu_backward(x, x, *with_slope, *layout[1:])


def registered():
    names = [s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("megapoly::")]
    return sorted(name.removeprefix("megapoly::") for name in names)


@pytest.mark.parametrize("name", registered())
def test_no_operator_drops_a_tangent(name):
    """Called directly, also with tensors that require no gradient."""
    leaves, _ = double("gated")
    x = leaves["x"]
    by_name = {packet._qualified_op_name.removeprefix("megapoly::"): f for packet, f in calls()}
    call = by_name[name]
    message = f"megapoly.{name}.default has no forward-mode derivative; use reverse mode"
    for differentiate in (lambda: jvp(call, (x,), (x,)), lambda: jacfwd(call)(x)):
        with pytest.raises(NotImplementedError, match=message):
            differentiate()
    with forward_ad.dual_level():
        for given in (x, x.clone().requires_grad_()):
            with pytest.raises(NotImplementedError, match=message):
                call(forward_ad.make_dual(given, x))
        call(x)  # nothing to differentiate


@pytest.mark.parametrize("name", OPERATORS)
def test_second_derivatives_are_refused(name):
    operator = functools.partial(OPERATORS[name][0], backend="reference")
    leaves, others = double("plain")

    def of_x(x):
        return loss(operator, others, leaves | {"x": x})

    def sum_of_gradient(x):
        return grad(of_x)(x).sum()

    nested = (grad(sum_of_gradient), lambda x: vjp(grad(of_x), x)[1](x))
    for second in (jacrev(jacrev(of_x)), torch.func.hessian(of_x), *nested):
        with pytest.raises(NotImplementedError, match="has no (forward-mode )?derivative"):
            second(leaves["x"])


def test_statistics_alone_have_no_derivative():
    x, rsqrt = torch.ones(2, 8, requires_grad=True), torch.ops.megapoly.polynorm_rsqrt
    with pytest.raises(NotImplementedError, match="polynorm_rsqrt.default has no derivative"):
        rsqrt(x, ORDER, 1e-6, 8, "", False, "reference").sum().backward()


def with_dtensors():
    messages = {}
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (1,))
    x, a = torch.ones(4, 8), torch.ones(4)
    cases = {
        "x": (distribute_tensor(x, mesh, [Shard(1)]), a),
        "coefficients": (x, distribute_tensor(a, mesh, [Replicate()])),
    }
    for operator in (polynorm, polyrelu):
        for name, arguments in cases.items():
            try:
                operator(*arguments)
            except ShapeError as error:
                messages[operator.__name__, name] = str(error)
    try:
        PolyNorm()(cases["x"][0])
    except ShapeError as error:
        messages["module", "x"] = str(error)
    dist.destroy_process_group()
    return messages


def test_dtensors_are_refused_with_the_remedy():
    (messages,) = run_on_ranks(with_dtensors, 1)
    assert len(messages) == 5
    for (_, name), message in messages.items():
        assert f"`{name}` must be a local tensor" in message
        assert f"`{name}.to_local()`" in message and "`group`" in message
