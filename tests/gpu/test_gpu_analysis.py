"""The analysis of a learned activation is the same on a GPU as on the CPU."""

from __future__ import annotations

import pytest
import torch

from megapoly.activations import registry
from megapoly.study.analysis.activation_statistics import ActivationStatistics
from megapoly.study.analysis.effective_rank import effective_rank
from megapoly.study.analysis.learned_activation import LearnedActivation

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def described(name: str, device: str) -> list[float]:
    activation = registry.get(name)
    torch.manual_seed(1)
    x = torch.randn(50, 128).to(device)
    coefficients = {"coefficients": torch.tensor([0.1, 0.5, -0.3, 0.2], device=device)}
    options = {"eps": 1e-6, "norm": "rms"} if activation.normalized else {}
    found = ActivationStatistics(LearnedActivation(activation, coefficients, options))
    found.add(x)
    curve, statistics, shares = found.curve(), found.statistics(), found.power_shares()
    assert shares is not None
    numbers = [*curve["x"], *curve["y"], *shares, statistics["flat"]]
    return numbers + [*statistics["before"].values(), *statistics["after"].values()]


@pytest.mark.parametrize("name", ["polyrelu", "polynorm", "gated_polynorm"])
def test_learned_activations(name: str) -> None:
    on_cpu = described(name, "cpu")
    assert len(on_cpu) > 100
    assert described(name, "cuda") == pytest.approx(on_cpu, rel=1e-4, abs=1e-6)


def test_effective_rank() -> None:
    matrix = torch.randn(96, 64, generator=torch.Generator().manual_seed(1))
    assert effective_rank(matrix.cuda()) == pytest.approx(effective_rank(matrix), rel=1e-9)
