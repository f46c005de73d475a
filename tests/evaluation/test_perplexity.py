"""Losses of a checkpoint at any layout are those that training reported at its step."""

import math

import pytest

pytest.importorskip("lm_eval")

LAYOUTS = [
    *(("dense", name) for name in ("1", "tp2", "pp2", "pp2-vpp2", "dp2", "cp2")),
    ("bf16", "1"),
    *(("moe", name) for name in ("1", "ep2", "tp2-ep2-etp1")),
]


@pytest.mark.parametrize(("model", "layout"), LAYOUTS)
def test_losses_are_those_of_training(trained, evaluated, model, layout):
    _, reported = trained(model)
    for outcome in evaluated(model, layout):
        assert list(outcome.validation) == ["a", "b", "mean"]
        for name, (loss, ppl, _) in outcome.validation.items():
            assert loss == pytest.approx(reported[f"val/{name}/loss"], abs=1e-5)
            assert ppl == pytest.approx(math.exp(reported[f"val/{name}/loss"]), rel=1e-4)
        num_tokens = [num_tokens for _, _, num_tokens in outcome.validation.values()]
        assert num_tokens[0] + num_tokens[1] == num_tokens[2]
        assert num_tokens[0] < num_tokens[1] < 10_000
