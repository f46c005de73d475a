"""Steps with spikes and values that are not finite: skipped, reported or refused, exactly."""

import math
import shutil

import pytest
from spiking_jobs import DENSE, LAYOUTS, SKIP, Fault, assert_same_tensors, checkpoint, train

TIMES = {"step_time_s", "tokens_per_second", "tflops_per_device", "time"}
DROPOUT = {"model.hidden_dropout": 0.1, "model.attention_dropout": 0.1}
SAVING = {"checkpoint.save_interval": 1}
IN_FAST_TESTS = {"tp2", "ep2-bf16-overlap"}


def results(metrics):
    return [{name: value for name, value in line.items() if name not in TIMES} for line in metrics]


def layouts(fast):
    """Return the layouts to test; those that are not fast only in the tests of layouts."""
    return [
        pytest.param(name, marks=[] if name in fast else [pytest.mark.parallel]) for name in LAYOUTS
    ]


@pytest.mark.parametrize("layout", layouts(IN_FAST_TESTS))
def test_a_skipped_step_is_a_step_whose_batch_is_passed_over(tmp_path, layout):
    """On the last rank alone the loss of step 5 is not finite; all ranks skip the step."""
    recipe, options = LAYOUTS[layout]
    fault = Fault("loss", (5,), rank=1)
    skipped = train(tmp_path / "a", options | SKIP, fault, recipe=recipe, num_ranks=2)
    passed = train(
        tmp_path / "b", options | {"training.skip_batches": "[5]"}, recipe=recipe, num_ranks=2
    )
    assert skipped.metrics[4]["skipped_steps"] == 1 and skipped.metrics[4]["spike"] is True
    assert [line["iteration"] for line in passed.metrics] == [1, 2, 3, 4, 6]
    assert results(skipped.metrics[:4] + skipped.metrics[5:]) == results(passed.metrics)
    assert_same_tensors(checkpoint(tmp_path / "a", 6), checkpoint(tmp_path / "b", 6))


@pytest.mark.parametrize("layout", layouts({"dp2-overlap"}))
def test_a_report_changes_nothing(tmp_path, layout):
    recipe, options = LAYOUTS[layout]
    fault, never = Fault("loss", (5,), factor=100.0), {"training.spike_window": 128}
    options = options | DROPOUT
    reported = train(tmp_path / "a", options, fault, recipe=recipe, num_ranks=2)
    plain = train(tmp_path / "b", options | never, fault, recipe=recipe, num_ranks=2)
    (line,) = reported.unusual
    assert line.startswith("step 5: lm_loss 8") and line.endswith("; trained on")
    assert plain.unusual == []
    assert reported.metrics[4].pop("spike") is True
    assert results(reported.metrics) == results(plain.metrics)
    assert_same_tensors(checkpoint(tmp_path / "a", 6), checkpoint(tmp_path / "b", 6))


def test_a_skipped_step_is_one_without_the_optimizer(tmp_path):
    """With dropout, whose state moves on; and resumed between two skipped steps."""
    dense = DENSE | DROPOUT | {"training.train_iters": 8}
    options = dense | SKIP
    spikes = Fault("loss", (4, 7), factor=1e4)
    skipped = train(tmp_path / "a", options | SAVING, spikes)
    left_out = dense | {"training.spike_window": 128}
    plain = train(tmp_path / "b", left_out, Fault("left out", (4, 7)))
    assert_same_tensors(checkpoint(tmp_path / "a", 8), checkpoint(tmp_path / "b", 8))
    assert [line.get("skipped_steps") for line in skipped.metrics[3:7]] == [1, None, None, 2]
    ordinary = [0, 1, 2, 4, 5, 7]
    assert results([skipped.metrics[i] for i in ordinary]) == results(
        [plain.metrics[i] for i in ordinary]
    )
    assert [line.split(" ")[1] for line in skipped.unusual] == ["4:", "7:"]

    first = checkpoint(tmp_path / "a", 8).rename(tmp_path / "first")
    for step in (6, 7):
        shutil.rmtree(checkpoint(tmp_path / "a", step))
    resumed = train(tmp_path / "a", options, spikes)
    assert results(resumed.metrics) == results(skipped.metrics)
    assert resumed.unusual == skipped.unusual[1:]
    assert_same_tensors(checkpoint(tmp_path / "a", 8), first)


@pytest.mark.parametrize("factor", [math.nan, 1e9])
def test_a_rank_whose_gradient_alone_is_wrong_makes_all_skip(tmp_path, factor):
    """After the reduction, so that the norms of the two replicas differ."""
    fault = Fault("gradient", (5,), rank=1, factor=factor)
    job = train(tmp_path / "a", DENSE | SKIP, fault, num_ranks=2)
    train(tmp_path / "b", DENSE | {"training.skip_batches": "[5]"}, num_ranks=2)
    assert_same_tensors(checkpoint(tmp_path / "a", 6), checkpoint(tmp_path / "b", 6))
    (line,) = job.unusual
    assert line.startswith("step 5: grad_norm ")
    if math.isnan(factor):
        assert "the gradient of output_layer.weight is the first that is not, on rank 1;" in line
        assert "the norm is not finite on rank 1 of 2 only" in line


def test_a_run_that_stops_changes_no_weight_and_says_where_to_go_on(tmp_path):
    options = DENSE | SAVING | {"training.spike_action": "stop", "checkpoint.keep": 1}
    job = train(tmp_path, options, Fault("loss", (6,), factor=1e4))
    (error,) = job.errors
    assert error.startswith("step 6: lm_loss 8")
    assert "The run ends before this step, because `training.spike_action` is stop." in error
    assert f"ordinary loss is {checkpoint(tmp_path, 5)}" in error
    assert "`--training.skip_batches [6]` it goes on from iter_0000005" in error
    assert [line["iteration"] for line in job.metrics] == [1, 2, 3, 4, 5]


def test_not_finite_ends_a_run_that_reports(tmp_path):
    job = train(tmp_path, DENSE | {"checkpoint.save": False}, Fault("loss", (2,), factor=math.inf))
    (error,) = job.errors
    assert error.startswith("step 2: lm_loss inf; grad_norm nan; the loss is not finite in")
    assert "micro-batch 1 of 4 of rank 0 (sample 4 of the data order)" in error
    assert "computed again, the forward pass is finite" in error
    assert "There is no checkpoint with an ordinary loss" in error


def test_samples_that_give_nan_are_named(tmp_path):
    """In the second micro-batch of rank 1 of two replicas: sample 11 of 8 .. 11 of step 3."""
    fault = Fault("module", (3,), rank=1, module="decoder.layers.1.self_attention.linear_proj")
    job = train(tmp_path, DENSE | {"checkpoint.save": False}, fault, num_ranks=2)
    assert job.errors[0] == job.errors[1]
    assert (
        "the first value that is not finite is an output of "
        "decoder.layers.1.self_attention.linear_proj, in micro-batch 2 of 2 of rank 1 (sample 11 "
    ) in job.errors[0]
