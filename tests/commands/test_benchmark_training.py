"""The yardstick is the same model, trained in the same way, as the one that it measures."""

import json

import pytest

from megapoly.testing import run_on_ranks
from megapoly.testing.jobs import shared_cache

# Large weights, so that every part of the model shows in the loss.
RECIPE = """
model: {num_layers: 2, hidden_size: 32, num_attention_heads: 2, ffn_hidden_size: 96,
        init_method_std: 0.2}
optimizer: {lr: 1e-2, weight_decay: 1.0, clip_grad: 0.5}
training: {train_iters: 4, seq_length: 24, micro_batch_size: 2, global_batch_size: 4}
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(f"{RECIPE}data: {{cache_dir: {shared_cache().name}}}")
    return path


def losses_of_first_steps(recipe, num_steps):
    from megapoly.benchmarks import training

    with training.candidates_of(recipe, []) as (candidates, _):
        return {c.name: [c.train_step() for _ in range(num_steps)] for c in candidates}


def test_plain_model_trains_as_megapoly_does(recipe):
    (losses,) = run_on_ranks(losses_of_first_steps, 1, recipe, 4)
    megapoly, plain = losses["megapoly, swiglu"], losses["plain, swiglu"]
    # The first is of the same weights; the others also show clipping, decay and AdamW.
    assert plain[0] == pytest.approx(megapoly[0], abs=1e-5)
    assert plain == pytest.approx(megapoly, abs=1e-4)
    assert megapoly[3] < megapoly[0] - 0.1


def run_tool(arguments):
    from megapoly.benchmarks import training

    return training.main(arguments)


def test_report_has_every_measurement(recipe, tmp_path):
    file = tmp_path / "speed.json"
    arguments = ["--config", recipe, "--json", file, "--rounds", 3, "--steps", 1]
    arguments += ["--activations", "polyrelu", "relu", "--threads", 1]  # nothing to compile
    assert run_on_ranks(run_tool, 1, [str(word) for word in arguments]) == [0]

    report = json.loads(file.read_text())
    assert (report["rounds"], report["steps"], report["threads"]) == (3, 1, 1)
    assert report["tokens_per_step"] == 4 * 24
    names = ["megapoly, swiglu", "plain, swiglu", "megapoly, polyrelu", "megapoly, relu"]
    assert [candidate["name"] for candidate in report["candidates"]] == names
    for candidate in report["candidates"]:
        speeds = sorted(candidate["tokens_per_second_by_round"])
        assert len(speeds) == 3 and speeds[0] > 0
        summary = {"min": speeds[0], "median": speeds[1], "max": speeds[2]}
        assert candidate["tokens_per_second"] == summary
    parameters = [candidate["num_parameters"] for candidate in report["candidates"]]
    assert parameters == [parameters[0], parameters[0], parameters[0] + 2 * 4, parameters[0]]
    goals = {name: ratio["goal"] for name, ratio in report["ratios"].items()}
    assert goals == {"swiglu / plain": 0.9, "polyrelu / swiglu": None, "relu / swiglu": None}


def test_other_models_are_refused(recipe, capsys):
    recipe.write_text(recipe.read_text().replace("num_layers: 2", "qk_norm: head"))
    assert run_tool(["--config", str(recipe)]) == 2
    assert "`model.qk_norm` (head) must be none" in capsys.readouterr().err
