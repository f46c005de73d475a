"""Losses of a checkpoint at any layout are those that training reported at its step."""

import json
import math

import pytest
from evaluation_jobs import shown

from megapoly.evaluation.perplexity import PerplexityOptions
from megapoly.testing import run_on_ranks

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


def test_command_prints_and_writes(trained, texts, tmp_path):
    checkpoint, reported = trained("dense")
    overrides = ["--data.validation", f"{{mine: {{path: {texts}/a, weight: 2}}}}"]
    output = tmp_path / "results" / "ppl.json"
    options = PerplexityOptions(checkpoint, overrides, output)
    (first, second) = run_on_ranks(shown, 2, options)
    assert first[0] == second[0] == 0 and second[1] == ""
    loss = reported["val/a/loss"]
    row = next(line for line in first[1].splitlines() if "mine" in line)
    assert row.replace("│", "").split()[:3] == ["mine", f"{loss:.4f}", f"{math.exp(loss):.3f}"]
    record = json.loads(output.read_text())
    assert record["iteration"] == 3 and record["eval_iters"] is None
    assert record["domains"]["mine"]["loss"] == pytest.approx(loss, abs=1e-5)
    assert record["domains"]["mine"]["weight"] == 2 and "mean" not in record


def test_command_says_what_is_wrong(trained, tmp_path):
    checkpoint, _ = trained("dense")
    options = PerplexityOptions(checkpoint, ["--model.hidden_size", "32", "--optimizer.lr", "1"])
    ((status, out, err),) = run_on_ranks(shown, 1, options)
    assert status == 2 and out == ""
    assert "`model.hidden_size`" in err and "`optimizer.lr`" in err
    assert "nothing reads this" in err
    ((status, _, err),) = run_on_ranks(shown, 1, PerplexityOptions(tmp_path))
    assert status == 2 and "not a complete checkpoint" in err
