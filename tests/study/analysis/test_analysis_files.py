"""Files and figures of the command, and its errors."""

import json

import numpy as np
import pytest
from analysis_jobs import NUM_TOKENS, run_tool

from megapoly.conversion.checkpoint_reader import CheckpointReader, find_checkpoint
from megapoly.data.token_files import open_token_file
from megapoly.study.analysis import figures
from megapoly.study.analysis.coefficients import coefficient_series
from megapoly.study.analysis.command import PARTS
from megapoly.testing import run_on_ranks

LAYOUT = "tp2-ep2-etp1"


def test_coefficients_end_as_the_checkpoint_has_them(trained, analysis):
    found = analysis(LAYOUT)["coefficients"]
    run = trained(LAYOUT)
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert found["tokens"] == [step["consumed_tokens"] for step in steps] == [128, 256]
    assert len(found["series"]) == 2 * (4 + 1) * 4
    reader = CheckpointReader(find_checkpoint(run))
    key = "decoder.layers.mlp.experts.experts.activation_func.coefficients"
    last = reader.read(key, (1, 3)).tolist()
    tags = [f"activation/layer_01/experts/expert_03/a{i}" for i in range(4)]
    assert [found["series"][tag][-1] for tag in tags] == pytest.approx(last, rel=1e-6)
    early = coefficient_series(run, 1)
    assert early["tokens"] == [128]


def test_without_tensorboard_files_it_says_so(tmp_path):
    found = coefficient_series(tmp_path, 5)
    assert found["series"] == {} and "TensorBoard" in found["missing"]


def test_every_expert_that_got_tokens_is_described(analysis, text):
    found = analysis(LAYOUT)
    tokens = [entry["tokens"] for entry in found["similarity"]["experts"]["per_layer"]]
    expected = {(i, "experts", e) for i in range(2) for e in range(4) if tokens[i][e]}
    expected |= {(i, "shared_experts", None) for i in range(2)}
    for part in ("curves", "power_shares", "activations"):
        places = [(e["layer"], e["kind"], e["expert"]) for e in found[part]]
        assert len(places) == len(set(places)) and set(places) == expected
    (named,) = found["text"]["sets"]
    assert named["tokens"] == found["text"]["tokens"] == NUM_TOKENS
    assert named["fingerprints"] == [open_token_file(text).fingerprint]


def test_figures_show_the_numbers(analysis):
    one = analysis(LAYOUT) | {"label": "first"}
    drawn = figures.draw_all([one, one | {"label": "second"}])
    assert set(drawn) == {
        *("effective_rank", "similarity", "expert_similarity", "power_shares"),
        *("activation_statistics", "coefficients_0", "coefficients_1", "curves_0", "curves_1"),
    }
    fc1, _, fc2 = drawn["effective_rank"].axes
    for axes, name in ((fc1, "fc1"), (fc2, "down")):
        weights = [w for w in one["effective_rank"]["weights"] if w["weight"] == name]
        routed = [w for w in weights if w["expert"] is not None]
        means = [
            np.mean([w["effective_rank"] for w in routed if w["layer"] == layer])
            for layer in range(2)
        ]
        assert [line.get_label() for line in axes.lines] == ["first", "second"]
        np.testing.assert_allclose(axes.lines[0].get_ydata(), means)
    heat = [axes.images[0] for axes in drawn["similarity"].axes if axes.images]
    np.testing.assert_allclose(heat[1].get_array(), one["similarity"]["matrix"])
    assert figures.draw_all([one | {"coefficients": None, "effective_rank": None}]).keys() == {
        *("similarity", "expert_similarity", "power_shares", "activation_statistics", "curves")
    }


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--parts", "rank", "--tokens", "5"], "`--tokens` has no effect"),
        (["--parts", "rank", "--data.validation=x"], "has no effect"),
        (["--training.device=cpu"], "use `--device`"),
        ([], "does not exist"),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_reason(arguments, reason, tmp_path):
    given = ("--model", tmp_path / "run", *arguments)
    ((status, printed),) = run_on_ranks(run_tool, 1, *given)
    assert status == 2 and reason in printed


def test_several_processes_are_refused(tmp_path):
    for status, printed in run_on_ranks(run_tool, 2, "--checkpoint", tmp_path):
        assert status == 2 and "one process" in printed


def test_help_names_the_parts():
    ((status, text),) = run_on_ranks(run_tool, 1, "--help")
    assert status == 0
    assert all(f"\n{part} " in text for part in PARTS)
