"""Differences, and what is said of them."""

import json
import math

import pytest
import torch
from rich.console import Console

from megapoly.config import Config
from megapoly.preflight.layouts import parse_layout
from megapoly.preflight.parallel_check.comparison import FP32, compare
from megapoly.preflight.parallel_check.job import Step
from megapoly.preflight.parallel_check.report import Report, Row
from megapoly.preflight.parallel_check.whole_model import ParameterShard, assemble


def step():
    gradients = {
        "output_layer.weight": torch.ones(3),
        "decoder.final_layernorm.weight": torch.ones(2),
        "decoder.layers.mlp.weight": torch.ones(2, 4),
        "decoder.layers.attention.weight": torch.tensor([[1.0], [0.0]]),
        "embedding.word_embeddings.weight": torch.ones(3),
    }
    return Step({"lm_loss": 8.0, "z_loss": 2.0}, 4.0, gradients)


def test_equal_runs_do_not_differ():
    found = compare([step()], [step()])
    assert found.loss == found.grad_norm == found.worst_gradient == 0.0
    assert list(found.gradients) == [
        "embedding.word_embeddings.weight",
        "decoder.layers.0.mlp.weight",
        "decoder.layers.0.attention.weight",
        "decoder.layers.1.mlp.weight",
        "decoder.layers.1.attention.weight",
        "decoder.final_layernorm.weight",
        "output_layer.weight",
    ]


def test_the_largest_relative_difference_of_all_steps_counts():
    wrong = step()
    wrong.losses["z_loss"] = 2.0 + 2e-3
    wrong.grad_norm = 4.0 - 4e-4
    wrong.gradients["decoder.layers.mlp.weight"][1] += 3e-3
    wrong.gradients["output_layer.weight"][0] += 1.0
    found = compare([step(), wrong, step()], [step()] * 3)
    assert found.loss == pytest.approx(1e-3)
    assert found.grad_norm == pytest.approx(1e-4)
    assert found.gradients["decoder.layers.0.mlp.weight"] == 0.0
    assert found.gradients["decoder.layers.1.mlp.weight"] == pytest.approx(3e-3, rel=1e-4)
    assert found.worst_gradient == pytest.approx(1 / math.sqrt(3))
    assert found.first_beyond(FP32) == "decoder.layers.1.mlp.weight"


def test_a_gradient_where_there_is_none_is_infinitely_wrong():
    wrong = step()
    wrong.gradients["decoder.layers.attention.weight"][1] = 1e-30
    assert compare([wrong], [step()]).worst_gradient == math.inf


def test_what_is_not_a_number_is_beyond_tolerance():
    wrong = step()
    wrong.gradients["output_layer.weight"][0] = math.nan
    found = compare([wrong], [step()])
    assert not found.is_within(FP32) and found.first_beyond(FP32) == "output_layer.weight"


def test_ranks_that_disagree_are_found():
    same = [ParameterShard("w", (slice(0, 2),), (2,), torch.ones(2)) for _ in range(2)]
    assert (
        torch.equal(assemble(same).tensors["w"], torch.ones(2)) and not assemble(same).disagreements
    )
    other = ParameterShard("w", (slice(0, 2),), (2,), torch.tensor([1.0, 1.0 + 2**-23]))
    assert assemble([*same, other]).disagreements == {"w": pytest.approx(2**-23 / 2**0.5)}
    drifting = step()
    drifting.disagreements = {"w": 1e-9}
    assert not compare([drifting], [step()]).is_within(FP32)


def test_a_part_that_no_rank_holds_is_not_a_number():
    incomplete = assemble([ParameterShard("w", (slice(0, 1),), (2,), torch.ones(1))]).tensors["w"]
    assert incomplete.isnan().tolist() == [False, True]


def test_report(tmp_path):
    wrong = step()
    wrong.gradients["output_layer.weight"][0] += 1.0
    report = Report(
        Config(),
        FP32,
        [
            Row(parse_layout("tp2"), 1.5, compare([step()], [step()])),
            Row(parse_layout("ep2"), 2.5, compare([wrong], [step()])),
            Row(parse_layout("pp2"), 0.5, failure="Traceback\nValueError: no such stage\n"),
        ],
    )
    assert not report.is_right
    console = Console(width=80, record=True)
    console.print(report.table())
    text = console.export_text()
    assert "tp2" in text and "0.0e+00" in text and "5.8e-01" in text and "failed" in text
    assert report.findings() == [
        "ep2-dp2: the first parameter whose gradient differs is output_layer.weight, by 5.8e-01",
        "pp2: ValueError: no such stage",
        "2 of 3 layouts differ from one process, beyond loss 1e-05, gradient norm 1e-05, "
        "gradients 1e-05",
    ]
    report.write_json(tmp_path / "report.json")
    content = json.loads((tmp_path / "report.json").read_text())
    assert [row["is_right"] for row in content["layouts"]] == [True, False, False]
    assert content["layouts"][1]["gradients"]["output_layer.weight"] == pytest.approx(1 / 3**0.5)
    assert content["layouts"][1]["first_parameter"] == "output_layer.weight"
    assert content["layouts"][2]["failure"].endswith("no such stage\n")
    assert content["config"]["model"]["activation"] == "polynorm"
    report.rows = report.rows[:1]
    assert report.is_right and report.findings()[0].startswith("The layout trains")
