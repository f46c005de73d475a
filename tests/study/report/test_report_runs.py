import json

import pytest
from made_runs import BATCH, SEQUENCE, STEP, write_run

from megapoly.errors import DataError
from megapoly.preflight.planning.parameters import total_parameters
from megapoly.study.report.content import read
from megapoly.study.report.grouping import group_runs
from megapoly.study.report.runs import read_metrics, read_run, to_record


def test_final_losses(tmp_path):
    losses = [5.0] * 36 + [4.0, 2.0, 1.0, 3.0]
    evaluations = {20: {"a": 4.0, "b": 6.0}, 40: {"a": 2.0, "b": 3.0}}
    run = read_run(write_run(tmp_path / "r", losses, evaluations=evaluations, tasks={"piqa": 61.5}))
    # A twentieth of 40 steps.
    assert run.window_steps == 2
    assert run.training_loss == 2.0
    assert run.validation_loss() == 2.5
    assert [run.validation_loss(name) for name in run.domains] == [2.0, 3.0]
    assert run.validation["tokens"] == [20 * STEP, 40 * STEP]
    assert run.tasks == {"piqa": 61.5}
    assert (run.tokens, run.wall_time_s, run.wall_time_of) == (40 * STEP, 20.0, "steps")
    assert run.complete


def test_mean_of_a_single_set_is_its_own(tmp_path):
    run = read_run(write_run(tmp_path / "r", [3.0] * 4, evaluations={4: {"books": 2.5}}))
    assert (run.domains, run.validation_loss()) == (["books"], 2.5)


def test_parameters_are_those_that_a_plan_counts(tmp_path):
    from megapoly.config import load_yaml

    folder = write_run(tmp_path / "r", [3.0], overrides=("--model.num_moe_experts", "4"))
    run = read_run(folder)
    assert run.parameters == total_parameters(load_yaml(folder / "config.yaml"))
    # Two of four experts are met: two ungated FFN of 64 x 264 by layer less, four layers.
    assert run.parameters - run.active_parameters == 2 * 2 * 64 * 264 * 4


@pytest.mark.parametrize(
    ("steps", "evaluated", "complete"), [(10, 10, True), (20, 10, False), (10, 5, False)]
)
def test_a_run_is_complete_with_its_last_step_and_evaluation(tmp_path, steps, evaluated, complete):
    folder = write_run(tmp_path / "r", [3.0] * 10, steps=steps, evaluations={evaluated: {"a": 2.0}})
    assert read_run(folder).complete is complete


def test_a_run_without_validation_is_complete_with_its_last_step(tmp_path):
    assert not read_run(write_run(tmp_path / "short", [3.0] * 10, steps=11)).complete
    assert read_run(write_run(tmp_path / "whole", [3.0] * 10)).complete


def test_a_run_that_changed_its_batch_ends_with_its_samples(tmp_path):
    # 2 steps of a quarter of the batch, then whole ones, up to the samples of 10: 2 + 9.5, so 12.
    steps = {
        count: write_run(tmp_path / f"of_{count}", [3.0] * count, steps=10) for count in (11, 12)
    }
    for folder in steps.values():
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for line in lines:
            batches = line["iteration"] / 4 if line["iteration"] <= 2 else line["iteration"] - 1.5
            line["consumed_samples"] = round(batches * BATCH)
            line["consumed_tokens"] = line["consumed_samples"] * SEQUENCE
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    unfinished, whole = read_run(steps[11]), read_run(steps[12])
    assert (unfinished.complete, whole.complete) == (False, True)
    assert unfinished.steps == whole.steps == 12
    assert unfinished.tokens == whole.tokens == round(10.5 * BATCH) * SEQUENCE
    plain = read_run(write_run(tmp_path / "plain", [3.0] * 10))
    assert len(group_runs([whole, plain], "polynorm")) == 2


def test_a_run_that_changed_its_sequence_length_ends_with_its_samples(tmp_path):
    folder = write_run(tmp_path / "r", [3.0] * 10)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line["consumed_tokens"] -= min(line["iteration"], 6) * STEP // 2
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    run = read_run(folder)
    assert run.complete and (run.steps, run.tokens) == (10, 7 * STEP)


def test_curves_are_thinned(tmp_path):
    run = read_run(write_run(tmp_path / "r", [float(i) for i in range(1000)]))
    assert len(run.training["tokens"]) == 150
    assert run.training["tokens"][0] == STEP and run.training["tokens"][-1] == 1000 * STEP
    # 50 steps up to 999.
    assert run.training_loss == 974.5


def test_a_loss_that_is_not_finite_is_none(tmp_path):
    options = {"evaluations": {2: {"a": 2.0}}, "tasks": {"piqa": float("nan"), "arc": 40.0}}
    run = read_run(write_run(tmp_path / "r", [3.0, float("nan")], **options))
    assert run.training["loss"] == [3.0, None]
    assert run.tasks == {"arc": 40.0}
    json.dumps(to_record(run), allow_nan=False)


def test_no_place_on_disk_is_kept(tmp_path):
    run = read_run(write_run(tmp_path / "r", [3.0], evaluations={1: {"a": 2.0}}))
    text = json.dumps([run.config, run.data])
    assert "/somewhere" not in text and str(tmp_path) not in text
    assert run.config["data"]["validation"] == {"a": "a_text_document"}
    assert run.data["fingerprint"] == "ffffffffffff0001"


def test_damaged_lines_and_one_that_is_being_written_are_left_out(tmp_path, caplog):
    path = write_run(tmp_path / "r", [3.0, 2.0]) / "metrics.jsonl"
    path.write_text(path.read_text() + '{"iteration": 3, "lm_')
    assert [step["iteration"] for step in read_metrics(path)] == [1, 2]
    assert not caplog.records
    whole = path.read_bytes()
    path.write_bytes(b'{"iter\n\xff\xfe\x00\n[1]\n{"x": 1}\n' + whole)
    assert [step["iteration"] for step in read_metrics(path)] == [1, 2]
    assert "line 1, is not a step of a run (it is damaged) and is left out" in caplog.text
    assert "so are 3 more lines" in caplog.text
    path.write_text('{"iteration": 1, "lm_loss": 3.0}\n')
    with pytest.raises(DataError, match="line 1, .*consumed_tokens, step_time_s missing"):
        read_metrics(path)


def test_comparison_is_read_and_two_with_one_name_are_distinguished(tmp_path):
    for size in ("small", "large"):
        folder = tmp_path / size / "dense"
        write_run(folder / "polynorm.seed_1", [3.0], lr=1e-3 if size == "small" else 2e-3)
        trials = {"polynorm.seed_1": {"wall_time_s": 77.0, "phase": "seeds"}}
        comparison = {"commands": [f"compare {size}"], "trials": trials, "chosen": {}}
        (folder / "comparison.json").write_text(json.dumps(comparison))
    content = read([tmp_path])
    assert [(run.wall_time_s, run.wall_time_of) for run in content.runs] == [(77.0, "trial")] * 2
    commands = [content.comparisons[run.comparison]["commands"] for run in content.runs]
    assert sorted(commands) == [["compare large"], ["compare small"]]


def test_a_validation_set_may_have_any_name(tmp_path):
    run = read_run(write_run(tmp_path / "r", [3.0], evaluations={1: {"tokens": 2.0, "loss": 3.0}}))
    assert run.complete and run.domains == ["tokens", "loss"]
    assert (run.validation_loss("tokens"), run.validation_loss()) == (2.0, 2.5)


def test_skipped_steps_are_not_in_the_training_loss(tmp_path):
    folder = write_run(tmp_path / "r", [3.0] * 10)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for i, loss in ((4, None), (6, 1e9)):
        lines[i] |= {"lm_loss": loss, "spike": True, "skipped_steps": 1}
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    run = read_run(folder)
    assert run.complete and run.training["loss"] == [3.0] * 8
