"""PolyNorm and PolyReLU as modules: against definitions in float64, state dicts, copies."""

from __future__ import annotations

import copy

import pytest
import torch
from definitions import (
    FORMS,
    POLYNORM_FORMS,
    assert_close,
    make_arguments,
    module_operator,
    polynorm_definition,
    polyrelu_definition,
)

from megapoly.errors import ShapeError
from megapoly.ops import PolyNorm, PolyReLU, expert_offsets

DEFINITIONS = {PolyNorm: polynorm_definition, PolyReLU: polyrelu_definition}


@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize(
    ("kind", "form"),
    [*((PolyNorm, form) for form in POLYNORM_FORMS), *((PolyReLU, form) for form in FORMS)],
)
def test_equals_definition(kind, form, order):
    """Two ranks that share rows are in test_ranks_share_rows.py."""
    arguments = make_arguments(form, order=order)
    expected = arguments.run(DEFINITIONS[kind])
    assert_close(arguments.run(module_operator(kind), backend="reference"), expected)


def test_options_reach_the_operator():
    arguments, options = make_arguments("routed"), {"norm": "l2", "eps": 0.5}
    expected = arguments.run(polynorm_definition, **options)
    actual = arguments.run(module_operator(PolyNorm), backend="reference", **options)
    assert_close(actual, expected)


@pytest.mark.parametrize("kind", [PolyNorm, PolyReLU])
def test_first_half_is_activated_and_multiplied_by_the_second(kind):
    arguments = make_arguments("gated")
    module = kind(gated=True, backend="reference", dtype=torch.float64)
    joined = module(torch.cat([arguments.x, arguments.gate], dim=-1))
    assert torch.equal(joined, module(arguments.x, arguments.gate))
    coefficients = torch.tensor([0.0, 1 / 3, 1 / 3, 1 / 3], dtype=torch.float64)
    expected = DEFINITIONS[kind](arguments.x, coefficients, gate=arguments.gate)
    torch.testing.assert_close(joined, expected)


def test_initial_values():
    assert PolyNorm(4).coefficients.tolist() == [0.0, 0.25, 0.25, 0.25, 0.25]
    module = PolyReLU(2, num_experts=2, slope=0.5, device="meta", dtype=torch.bfloat16)
    assert module.coefficients.is_meta and module.coefficients.dtype == torch.bfloat16
    module.to_empty(device="cpu").reset_parameters()
    assert module.coefficients.tolist() == [[0.0, 0.5, 0.5]] * 2
    assert module.slope.tolist() == [[0.5], [0.5]]
    assert dict(PolyReLU().named_parameters()).keys() == {"coefficients"}


def released_polynorm(x, weight, bias):
    """The paper's Eq. 3 with the highest power first."""

    def n(v):
        return v / (v.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    return weight[0] * n(x**3) + weight[1] * n(x**2) + weight[2] * n(x) + bias


def released_polyrelu(x, weight, bias):
    h = x.clamp(min=0)
    return weight[0] * h**3 + weight[1] * h**2 + weight[2] * h + bias


@pytest.mark.parametrize(
    ("kind", "released"), [(PolyNorm, released_polynorm), (PolyReLU, released_polyrelu)]
)
def test_released_state_dict_loads(kind, released):
    x = make_arguments("plain").x
    weight = torch.tensor([0.5, -2.0, 3.0], dtype=torch.float64)
    bias = torch.tensor([0.125], dtype=torch.float64)
    given = {"1.weight": weight, "1.bias": bias}
    model = torch.nn.Sequential(torch.nn.Identity(), kind(backend="reference").double())
    model.load_state_dict(given)
    torch.testing.assert_close(model(x), released(x, weight, bias))
    assert given.keys() == {"1.weight", "1.bias"}  # the caller's dict is left alone
    own = model.state_dict()
    assert own.keys() == {"1.coefficients"}
    again = torch.nn.Sequential(torch.nn.Identity(), kind(backend="reference").double())
    again.load_state_dict(own)
    assert torch.equal(again(x), model(x))


def test_released_state_dict_of_experts_has_a_leading_axis():
    module = PolyNorm(2, num_experts=2)
    module.load_state_dict(
        {
            "weight": torch.tensor([[2.0, 1.0], [5.0, 4.0]]),
            "bias": torch.tensor([[0.0], [3.0]]),
        }
    )
    assert module.coefficients.tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]


@pytest.mark.parametrize(
    ("state", "match"),
    [
        ({"weight": torch.ones(3)}, 'Missing key.*"coefficients"'),
        ({"weight": torch.ones(2), "bias": torch.ones(1)}, "size mismatch for coefficients"),
        ({"coefficients": torch.ones(4), "other": torch.ones(1)}, 'Unexpected key.*"other"'),
    ],
)
def test_other_state_dicts_are_refused(state, match):
    with pytest.raises(RuntimeError, match=match):
        PolyNorm().load_state_dict(state)


def test_deepcopy_trains_apart():
    x = make_arguments("plain").x.float()
    module = PolyReLU(slope=0.25, backend="reference")
    copied = copy.deepcopy(module)
    assert torch.equal(copied(x), module(x))
    copied(x).square().sum().backward()
    assert module.coefficients.grad is None and copied.slope.grad.item() != 0
    with torch.no_grad():
        copied.coefficients.zero_()
    assert module(x).any() and not copied(x).any()


class Group:
    """A process group's size, and that torch cannot copy one."""

    def size(self):
        return 1

    def __deepcopy__(self, memo):
        raise TypeError("cannot pickle 'ProcessGroup' object")


def test_deepcopy_shares_the_group():
    module = torch.nn.Sequential(PolyNorm(group=Group(), backend="reference"))
    copied = copy.deepcopy(module)
    assert copied[0].group is module[0].group
    assert "ranks=1" in repr(copied)


@pytest.mark.parametrize("gated", [False, True])
def test_compiles_as_one_graph(gated):
    torch._dynamo.reset()
    module = torch.nn.Sequential(torch.nn.Linear(6, 8), PolyNorm(gated=gated, backend="reference"))
    traced = torch.compile(copy.deepcopy(module), fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 6)
    for model in (module, traced):
        model(x).square().sum().backward()
    torch.testing.assert_close(traced(x), module(x))
    for found, expected in zip(traced.parameters(), module.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad)


def test_rows_sorted_by_expert():
    x = torch.randn(5, 8)
    module = PolyNorm(num_experts=3, backend="reference")
    with torch.no_grad():
        module.coefficients.copy_(torch.randn(3, 4))
    offsets = expert_offsets(torch.tensor([2, 0, 3]))
    assert offsets.dtype == torch.int32 and offsets.tolist() == [0, 2, 2, 5]
    first, last = PolyNorm(backend="reference"), PolyNorm(backend="reference")
    first.coefficients.data, last.coefficients.data = module.coefficients.data[[0, 2]]
    expected = torch.cat([first(x[:2]), last(x[2:])])
    torch.testing.assert_close(module(x, offsets=offsets), expected)


def test_print_shows_what_is_set():
    assert repr(PolyNorm()) == "PolyNorm(order=3, eps=1e-06, norm=rms, backend=auto)"
    module = PolyReLU(2, num_experts=8, slope=0.25, gated=True, deterministic=True)
    assert repr(module) == (
        "PolyReLU(order=2, slope=0.25, num_experts=8, gated=True, deterministic=True, backend=auto)"
    )


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"order": 5}, r"`order` \(5\) is not valid; must be one of \(2, 3, 4\)"),
        ({"num_experts": 0}, r"`num_experts` \(0\) must be at least 1"),
        ({"eps": 0.0}, r"`eps` \(0.0\) must be between"),
        ({"norm": "max"}, r"`norm` \(max\) is not valid; must be rms or l2"),
        ({"backend": "fast"}, r"`backend` \(fast\) is not valid; must be one of auto"),
    ],
)
def test_options_that_are_not_valid(options, match):
    with pytest.raises(ValueError, match=match):
        PolyNorm(**options)


def test_inputs_that_do_not_fit():
    x = torch.ones(3, 7)
    with pytest.raises(ValueError, match="construct it with gated=True"):
        PolyNorm()(x, x)
    with pytest.raises(ShapeError, match=r"\[.., 2 d\].*\(3, 7\).*pass `gate`"):
        PolyNorm(gated=True)(x)
    with pytest.raises(ShapeError, match="`coefficients` must be .* no offsets"):
        PolyNorm(num_experts=2)(x)


@pytest.mark.parametrize("kind", [PolyNorm, PolyReLU])
def test_forward_mode_is_refused(kind):
    module = kind(backend="reference")
    x = torch.ones(3, 8)
    with pytest.raises(NotImplementedError, match="use reverse mode"):
        torch.func.jvp(module, (x,), (x,))
    with torch.autograd.forward_ad.dual_level():  # nothing to differentiate
        assert module(x).shape == x.shape
