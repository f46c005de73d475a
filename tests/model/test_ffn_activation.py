"""The module in the engine's slot against formulas by hand, on one process."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megapoly.activations import ACTIVATIONS, get
from megapoly.config.resolve import resolve
from megapoly.config.schema import Config, TrainingConfig
from megapoly.model.ffn_activation import ActivationSettings, FFNActivation
from megapoly.platform.device import select_platform
from megapoly.platform.machine import CPU
from megapoly.testing import run_on_ranks
from megapoly.training.distributed import process_groups

WIDTH = 6
TOKENS_PER_EXPERT = [3, 0, 4]
ROWS = sum(TOKENS_PER_EXPERT)
# Values that distinguish powers, experts and the slope, by name in the registry.
VALUES = {"coefficients": [[0.5, 1.0, -2.0, 0.25], [9.0] * 4, [-1.0, 0.5, 3.0, 2.0]]}
VALUES["slope"] = [[0.1], [9.0], [0.4]]
USES = ("dense", "experts", "experts, own coefficients")


def inputs(gated):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, WIDTH * (2 if gated else 1), generator=generator)
    return x, torch.rand(ROWS, generator=generator)


@contextlib.contextmanager
def engine_config():
    """The engine's configuration, while its process groups exist."""
    config = Config(training=TrainingConfig(train_iters=1))
    config = resolve(config, tokenizer_vocab_size=8, machine=CPU)
    with process_groups(config, select_platform("cpu")):
        yield TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)


def activate_all():
    """Output of every activation in every use, and its initial parameters."""
    results = {}
    with engine_config() as engine:
        for name in ACTIVATIONS:
            for use in USES:
                own = use == USES[2]
                settings = ActivationSettings(
                    name, coefficients="per_expert" if own else "shared", backend="reference"
                )
                experts = None if use == "dense" else len(TOKENS_PER_EXPERT)
                module = FFNActivation(engine, settings=settings, num_local_experts=experts)
                initial = {n: p.detach().clone() for n, p in module.named_parameters()}
                for parameter_name, parameter in module.named_parameters():
                    values = torch.tensor(VALUES[parameter_name])
                    parameter.data.copy_(values if own else values[0])
                x, probs = inputs(module.activation.gated)
                routed = {"probs": probs, "tokens_per_expert": torch.tensor(TOKENS_PER_EXPERT)}
                output = module(x, **({} if use == "dense" else routed))
                results[name, use] = (output.detach(), initial)
    return results


@pytest.fixture(scope="module")
def results():
    return run_on_ranks(activate_all, 1)[0]


def silu(x):
    return x / (1 + (-x).exp())


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def positive(x):
    return torch.where(x > 0, x, torch.zeros_like(x))


def polynomial(h, a):
    return a[0] + a[1] * h + a[2] * h**2 + a[3] * h**3


def polynorm(x, a):
    def n(v):
        return v / (v.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    return a[0] + a[1] * n(x) + a[2] * n(x**2) + a[3] * n(x**3)


# x and u: halves of the input; a and s: coefficients and slope of the row's expert.
FORMULAS = {
    "swiglu": lambda x, u, a, s: silu(x) * u,
    "geglu": lambda x, u, a, s: gelu(x) * u,
    "gelu": lambda x, u, a, s: gelu(x),
    "silu": lambda x, u, a, s: silu(x),
    "relu": lambda x, u, a, s: positive(x),
    "squared_relu": lambda x, u, a, s: positive(x) ** 2,
    "polyrelu": lambda x, u, a, s: polynomial(positive(x), a),
    "polyprelu": lambda x, u, a, s: polynomial(torch.where(x > 0, x, s * x), a),
    "polynorm": lambda x, u, a, s: polynorm(x, a),
    "polyrelunorm": lambda x, u, a, s: polynorm(positive(x), a),
    "gated_polynorm": lambda x, u, a, s: polynorm(x, a) * u,
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_equals_formula(results, name, use):
    gated = get(name).gated
    x, probs = (tensor.double() for tensor in inputs(gated))
    halves = x.chunk(2, dim=-1) if gated else (x, None)
    expected = []
    experts = [e for e, count in enumerate(TOKENS_PER_EXPERT) for _ in range(count)]
    for row, expert in enumerate(experts):
        parameters = (VALUES[n][expert if use == USES[2] else 0] for n in ("coefficients", "slope"))
        a, s = (torch.tensor(values, dtype=torch.float64) for values in parameters)
        y = FORMULAS[name](halves[0][row], halves[1][row] if gated else None, a, s)
        expected.append(y if use == "dense" else probs[row] * y)
    output, _ = results[name, use]
    assert output.shape == (ROWS, WIDTH)
    torch.testing.assert_close(output.double(), torch.stack(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_initial_parameters_are_the_registry_s(results, name, use):
    entry = get(name)
    _, initial = results[name, use]
    expected = entry.coefficients(3) if entry.has_coefficients else {}
    assert initial.keys() == expected.keys()
    for parameter_name, values in expected.items():
        sets = torch.tensor(values)
        if use == USES[2]:
            sets = sets.expand(len(TOKENS_PER_EXPERT), -1)
        assert torch.equal(initial[parameter_name], sets)


def settings_reach_the_operator():
    """Output of PolyNorm with order 2, the L2 norm and a large epsilon."""
    settings = ActivationSettings("polynorm", order=2, norm="l2", eps=0.5, backend="reference")
    with engine_config() as engine:
        return FFNActivation(engine, settings=settings)(inputs(False)[0]).detach()


def test_settings_reach_the_operator():
    x = inputs(False)[0]
    expected = sum(
        0.5 * v / (v.square().sum(-1, keepdim=True) + 0.5).sqrt() for v in (x, x.square())
    )
    torch.testing.assert_close(run_on_ranks(settings_reach_the_operator, 1)[0], expected)
