"""The command: its exit status, what it prints, its report."""

import json

import pytest

from megapoly.commands import check_parallel
from megapoly.commands.check_parallel import main
from megapoly.preflight.parallel_check import job
from megapoly.testing.jobs import RECIPES

DENSE = ["--config", str(RECIPES / "dense_tiny.yaml"), "--model.num_query_groups", "2"]


def wrong_steps_of_rank(config):
    """Steps in which tensor parallelism doubles the gradients of the second layer's FC1."""
    steps = job.steps_of_rank(config)
    for shard in (shard for step in steps for shard in step.gradients):
        if "linear_fc1.weight" in shard.name and shard.place[0] == 1:
            shard.data *= config.parallel.tensor_model_parallel_size
    return steps


def test_layouts_that_are_right(capsys, tmp_path):
    report = tmp_path / "report.json"
    words = [*DENSE, "--steps", "2", "--layouts", "tp2", "cp2-a2a", "--world_sizes", "2"]
    assert main([*words, "--json", str(report)]) == 0
    output = capsys.readouterr()
    lines = output.out.splitlines()
    assert lines[0].split() == "layout processes loss grad norm gradients".split()
    assert [line.split()[:2] for line in lines[1:3]] == [["tp2", "2"], ["cp2-a2a", "2"]]
    assert lines[3].startswith("All 2 layouts train the model of one process, within loss 1e-05")
    assert "3/3" in output.err
    content = json.loads(report.read_text())
    assert content["is_right"] and content["config"]["model"]["num_query_groups"] == 2
    assert content["config"]["training"]["train_iters"] == 2
    gradients = content["layouts"][0]["gradients"]
    assert gradients["decoder.layers.3.mlp.activation_func.coefficients"] < 1e-5
    assert next(iter(gradients)) == "embedding.word_embeddings.weight"
    assert list(gradients)[-1] == "output_layer.weight"


def test_a_layout_that_is_wrong(capsys, monkeypatch):
    monkeypatch.setattr(job, "steps_of_rank", wrong_steps_of_rank)
    assert main([*DENSE, "--steps", "1", "--layouts", "tp2"]) == 1
    finding, verdict = capsys.readouterr().out.splitlines()[-2:]
    assert finding == (
        "tp2: the first parameter whose gradient differs is "
        "decoder.layers.1.mlp.linear_fc1.weight, by 1.0e+00"
    )
    assert verdict.startswith("1 of 1 layouts differ from one process, beyond")


def failing_steps_of_rank(config):
    if config.parallel.pipeline_model_parallel_size > 1:
        raise ValueError("no such stage")
    return job.steps_of_rank(config)


def test_a_layout_that_fails(capsys, monkeypatch):
    monkeypatch.setattr(job, "steps_of_rank", failing_steps_of_rank)
    assert main([*DENSE, "--steps", "1", "--layouts", "pp2", "1"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["pp2", "2", "failed"] and lines[2].split()[0] == "1"
    assert lines[3] == "pp2: ValueError: no such stage"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--layouts", "tp3"], "tp3: `parallel.tensor_model_parallel_size` (3) must divide"),
        (["--optimizer.clip_grad", "-1"], "`optimizer.clip_grad` (-1.0) must be at least 0"),
        (["--layouts", "tp2x"], "the layout 'tp2x' has the part 'tp2x'; parts are"),
        (["--layouts", "tp4", "--world_sizes", "2"], "none of the layouts fits [2] processes"),
        (["--training.fp8", "e4m3"], "`training.fp8` (e4m3) cannot be checked here"),
        (["--model.activation", "swiglue"], "the nearest is swiglu"),
        (["--model.no_such_option", "1"], "no_such_option"),
    ],
)
def test_what_is_refused(capsys, words, message):
    assert main([*DENSE, *words]) == 2
    output = capsys.readouterr()
    assert message in output.err and output.out == ""


def test_a_report_that_cannot_be_written_is_refused_before_the_work(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(check_parallel, "_train_all", lambda *_: pytest.fail("it trains"))
    assert main([*DENSE, "--layouts", "tp2", "--json", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"`--json` ({tmp_path}) cannot be written: Is a directory\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "0"], "--steps: 0 must be a whole number, 1 to "),
        (["--world-size", "2", "-1"], "--world-size: -1 must be a whole number, 1 to "),
        (["--timeout-s", "nan"], "--timeout-s: nan must be above 0"),
    ],
)
def test_numbers_that_check_nothing_are_refused(capsys, words, message):
    with pytest.raises(SystemExit, match="2"):
        main([*DENSE, *words])
    assert message in capsys.readouterr().err
