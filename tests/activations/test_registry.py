"""The registry: names, initial values, gates, and that nothing else decides by name."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import megapoly
from megapoly.activations import ACTIVATIONS, TensorParallelSum, get
from megapoly.errors import ConfigError

PACKAGE = Path(megapoly.__file__).parent
GATED = {"swiglu", "geglu", "gated_polynorm"}
POINTWISE = {"swiglu", "geglu", "gelu", "silu", "relu", "squared_relu"}
NORMALIZED = {"polynorm", "polyrelunorm", "gated_polynorm"}
POLYNOMIAL = {"polyrelu", "polyprelu"} | NORMALIZED


def test_every_name_is_there():
    assert set(ACTIVATIONS) == POINTWISE | POLYNOMIAL


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_properties(name):
    entry = get(name)
    assert entry.gated == (name in GATED)
    assert entry.has_coefficients == (name in POLYNOMIAL)
    assert entry.normalized == (name in NORMALIZED)
    sums = entry.tensor_parallel_sum
    assert (sums is TensorParallelSum.NOTHING) == (name in POINTWISE)


@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize("name", sorted(POLYNOMIAL))
def test_initial_values(name, order):
    expected = {"coefficients": [0.0] + [1 / order] * order}
    if name == "polyprelu":
        expected["slope"] = [0.25]
    assert get(name).coefficients(order) == expected


def test_unknown_name_is_an_error_with_the_nearest():
    with pytest.raises(ConfigError, match="the nearest is polynorm"):
        get("polynrom")


def test_nothing_outside_the_registry_compares_with_a_name():
    found = []
    for path in PACKAGE.rglob("*.py"):
        # An exported folder is a model without this package; benchmarks compare by name.
        if path.name == "registry.py" or path.parent.name in ("remote_code", "benchmarks"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare | ast.MatchValue):
                constants = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant)]
                found += [(path.name, value) for value in constants if value in ACTIVATIONS]
    assert found == []
