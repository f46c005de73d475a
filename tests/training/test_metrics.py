"""Output of a run: metrics.jsonl, TensorBoard, configuration, progress lines."""

import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megapoly.config import Config, load_yaml
from megapoly.config.schema import ModelConfig, TrainingConfig
from megapoly.platform.json_lines import LineWriter
from megapoly.testing import run_job
from megapoly.training.evaluation import Evaluation, weighted_mean
from megapoly.training.hooks import StepRecord
from megapoly.training.reporter import Reporter
from megapoly.training.step import StepResult
from megapoly.training.tensorboard import tag_of

OVERRIDES = {
    "model.num_layers": 2,
    "model.hidden_size": 64,
    "model.num_moe_experts": 4,
    "model.moe_ffn_hidden_size": 96,
    "model.moe_shared_expert_intermediate_size": 96,
    "model.activation_coefficients": "per_expert",
    "model.activation_backend": "reference",
    "training.train_iters": 6,
    "training.seq_length": 32,
    "training.micro_batch_size": 1,
    "training.global_batch_size": 4,
    "training.eval_interval": 3,
    "training.eval_iters": 1,
    "optimizer.lr_warmup_iters": 2,
    "logging.log_interval": 1,
    "logging.peak_tflops": 0.25,
    "logging.detail_interval": 2,
    "checkpoint.save": False,
    "parallel.pipeline_model_parallel_size": 1,
    "parallel.expert_model_parallel_size": 2,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run")
    return run_dir, run_job("moe_tiny", run_dir, OVERRIDES, num_ranks=2)


@pytest.fixture(scope="module")
def events(run):
    events = EventAccumulator(str(run[0] / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return events


@pytest.fixture(scope="module")
def scalars(events):
    return {
        tag: {event.step: event.value for event in events.Scalars(tag)}
        for tag in events.Tags()["scalars"]
    }


def test_every_step_has_its_line(run):
    _, metrics = run
    assert [line["iteration"] for line in metrics] == [1, 2, 3, 4, 5, 6]
    for line in metrics:
        assert line["consumed_samples"] == line["iteration"] * 4
        assert line["consumed_tokens"] == line["iteration"] * 4 * 32
        assert line["tokens_per_second"] == pytest.approx(4 * 32 / line["step_time_s"])
        assert line["mfu"] == pytest.approx(line["tflops_per_device"] / 0.25)
        assert math.isfinite(line["lm_loss"]) and line["grad_norm"] > 0
        assert line["load_balancing_loss"] > 0.99  # 1 when the experts are balanced
        assert line["z_loss"] > 0
        assert ("val/books/loss" in line) == (line["iteration"] in (3, 6))
    assert metrics[2]["val/books/ppl"] == pytest.approx(math.exp(metrics[2]["val/books/loss"]))
    assert [line["learning_rate"] for line in metrics[:3]] == [0.0, 0.001, 0.002]


def test_tensorboard_has_the_same(run, scalars):
    for line in run[1]:
        for name in line.keys() - {"iteration", "time"}:  # its events have their own times
            assert scalars[tag_of(name)][line["iteration"]] == pytest.approx(line[name], rel=1e-6)


def test_tensorboard_shows_the_losses_first(scalars):
    """It sorts tags by character code; the group is the part before the first slash."""
    tags = sorted(scalars)
    assert tags[:3] == ["Train/loss", "Val/books/loss", "Val/books/ppl"]
    groups = list(dict.fromkeys(tag.partition("/")[0] for tag in tags))
    assert groups[2:] == ["activation", "expert_load", "optimizer", "router", "throughput"]
    assert {tag for tag in tags if tag.startswith(("optimizer/", "router/"))} == {
        *("optimizer/grad_norm", "optimizer/learning_rate"),
        *("router/load_balancing_loss", "router/z_loss"),
    }


def test_tensorboard_has_the_configuration_as_text(run, events):
    (event,) = events.Tensors("config/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    config = (run[0] / "config.yaml").read_text()
    assert event.step == 0 and text == f"```yaml\n{config}```"


def test_coefficients_of_every_expert_and_layer(scalars):
    owners = [f"experts/expert_{expert:02d}" for expert in range(4)] + ["shared_experts"]
    for layer in range(2):
        for owner in owners:
            for power in range(4):
                values = scalars[f"activation/layer_{layer:02d}/{owner}/a{power}"]
                assert sorted(values) == [2, 4, 6]
                start = 0.0 if power == 0 else 1 / 3
                assert 0 < abs(values[6] - start) < 0.2  # learned, from the paper's initial value


def test_expert_load(scalars):
    for layer in range(2):
        load = scalars[f"expert_load/layer_{layer:02d}/max_over_mean"]
        idle = scalars[f"expert_load/layer_{layer:02d}/idle_fraction"]
        assert sorted(load) == sorted(idle) == [2, 4, 6]
        assert all(1.0 <= value <= 2.0 for value in load.values())  # top-2 of 4: at most 2
        assert all(value in (0.0, 0.25, 0.5) for value in idle.values())


def test_resolved_configuration_is_saved(run):
    config = load_yaml(run[0] / "config.yaml")
    assert config.model.vocab_size == 4096
    assert config.parallel.expert_model_parallel_size == 2
    assert config.optimizer.lr_decay_iters == 6


SETS = {"a": Evaluation(2.0, 100), "b": Evaluation(3.0, 300), "c": Evaluation(5.0, 100)}


def test_mean_over_sets_by_hand():
    by_tokens = weighted_mean(SETS, dict.fromkeys(SETS))
    assert by_tokens.loss == pytest.approx((200 + 900 + 500) / 500)
    assert by_tokens.num_tokens == 500
    assert by_tokens.ppl == pytest.approx(math.exp(3.2))
    weighted = weighted_mean(SETS, {"a": 1.0, "b": 1.0, "c": 0.5})
    assert weighted.loss == pytest.approx((2 + 3 + 2.5) / 2.5)


def shown(capsys, num_sets: int, tasks: dict[str, float] | None = None) -> list[str]:
    """Return the lines of a step with an evaluation and of one without."""
    metrics = {f"val/s{i}/loss": float(i) for i in range(num_sets)}
    if num_sets > 1:
        metrics["val/mean/loss"] = 9.0
    metrics |= {f"task/{name}": score for name, score in (tasks or {}).items()}
    state = SimpleNamespace(
        config=Config(
            model=ModelConfig(vocab_size=4096),
            training=TrainingConfig(train_iters=20, eval_interval=1),
        ),
        platform=SimpleNamespace(is_cuda=False, describe=lambda: "CPU, 1 thread"),
        iteration=10,
        train_iters=20,
        consumed_samples=0,
        consumed_tokens=0,
    )
    reporter = Reporter(state, num_devices=1, enabled=True)
    reporter._metrics = LineWriter(Path(os.devnull), print)
    result = StepResult(4.0, 1.0, 0.1)
    reporter.record(StepRecord(result, 1.0, metrics=metrics))
    state.iteration = 20
    reporter.record(StepRecord(result, 1.0))
    return capsys.readouterr().out.splitlines()


def test_a_few_sets_stand_in_the_line_of_a_step(capsys):
    one, three = shown(capsys, 1), shown(capsys, 3)
    assert [line.split(" | lr")[0] for line in one] == [
        "step 10/20 | loss 4.0000 | val/s0 0.0000",
        "step 20/20 | loss 4.0000 | val/s0 0.0000",
    ]
    sets = "val/s0 0.0000 | val/s1 1.0000 | val/s2 2.0000 | val/mean 9.0000"
    assert [line.split(" | lr")[0] for line in three] == [
        f"step 10/20 | loss 4.0000 | {sets}",
        f"step 20/20 | loss 4.0000 | {sets}",
    ]


def test_of_many_sets_the_line_has_the_mean_and_another_line_has_all(capsys):
    evaluated, all_sets, later = shown(capsys, 6)
    assert evaluated.startswith("step 10/20 | loss 4.0000 | val/mean 9.0000 | lr")
    assert later.startswith("step 20/20 | loss 4.0000 | val/mean 9.0000 | lr")
    numbers = " | ".join(f"val/s{i} {i}.0000" for i in range(6))
    assert all_sets == f"step 10/20 | {numbers} | val/mean 9.0000"


def test_a_few_tasks_stand_in_the_line_of_a_step(capsys):
    (few, later) = shown(capsys, 1, {"piqa": 51.25, "sciq": 20.0})
    scores = "val/s0 0.0000 | task/piqa 51.2 | task/sciq 20.0"
    assert few.startswith(f"step 10/20 | loss 4.0000 | {scores} | lr")
    assert later.startswith(f"step 20/20 | loss 4.0000 | {scores} | lr")


def test_many_tasks_have_a_line_of_their_own(capsys):
    tasks = {f"t{i}": float(i) for i in range(5)}
    line, of_tasks, later = shown(capsys, 1, tasks)
    assert "task/" not in line and "task/" not in later
    assert of_tasks == "step 10/20 | " + " | ".join(f"task/t{i} {i}.0" for i in range(5))
