"""Going back past a spike: which checkpoints are kept, set aside and taken; batches passed over."""

import json

import pytest
from spiking_jobs import (
    DENSE,
    SKIP,
    TENSOR,
    Fault,
    assert_same_tensors,
    checkpoint,
    train,
)

LONG = DENSE | {"training.train_iters": 20, "training.spike_window": 8}
SAVING = LONG | {"checkpoint.save_interval": 1, "checkpoint.keep": 2}


def names(run_dir):
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def position(run_dir, step):
    return json.loads((checkpoint(run_dir, step) / "run.json").read_text())


def test_a_run_goes_back_as_its_message_says(tmp_path):
    """Skipped until the budget is used up; then the same command with the option, twice."""
    faults = Fault("loss", (11, 12, 13))
    job = train(tmp_path / "a", SAVING | SKIP, faults)
    (error,) = job.errors
    assert "2 of the last 8 steps were skipped, the most that `training.spike_max_skips`" in error
    assert f"ordinary loss is {checkpoint(tmp_path / 'a', 10)}." in error
    assert "`--training.skip_batches [11-13]` it goes on from iter_0000010" in error
    # `keep` is 2, and the one with an ordinary loss is spared.
    assert names(tmp_path / "a") == ["iter_0000010", "iter_0000011", "iter_0000012"]
    assert [position(tmp_path / "a", step)["is_ordinary"] for step in (10, 11, 12)] == [
        True,
        False,
        False,
    ]

    option = {"training.skip_batches": "[11-13]", "training.train_iters": 16}
    option |= {"optimizer.lr_decay_iters": 20}
    train(tmp_path / "a", SAVING | SKIP | option, faults)
    assert names(tmp_path / "a") == [
        *("iter_0000011.set_aside", "iter_0000012.set_aside"),
        *("iter_0000015", "iter_0000016"),
    ]
    # Started again, also at another layout, it resumes from its own checkpoints.
    option["training.train_iters"] = 20
    job = train(tmp_path / "a", SAVING | SKIP | option | TENSOR, num_ranks=2)
    assert [line["iteration"] for line in job.metrics] == [*range(1, 11), *range(14, 21)]
    assert [line["consumed_samples"] for line in job.metrics[9:11]] == [40, 56]
    assert position(tmp_path / "a", 20)["passed_over"] == ["11-13"]
    whole = train(tmp_path / "b", LONG | option)
    for line, expected in zip(job.metrics, whole.metrics, strict=True):
        assert line["lm_loss"] == pytest.approx(expected["lm_loss"], abs=2e-5)
        assert line["learning_rate"] == expected["learning_rate"]


def test_a_run_that_goes_back_is_one_that_passed_over_at_once(tmp_path):
    option = {"training.skip_batches": "[5-6, 9]"}
    saving = SAVING | {"training.train_iters": 8, "optimizer.lr_decay_iters": 12}
    train(tmp_path / "a", saving | {"checkpoint.save_interval": 4, "checkpoint.keep": 0})
    whole = saving | option | {"training.train_iters": 12, "checkpoint.save_interval": 0}
    back = train(tmp_path / "a", whole)
    at_once = train(tmp_path / "b", whole)
    assert "passed over the batches of step 5-6" in back.printed
    assert [line["lm_loss"] for line in back.metrics] == [
        line["lm_loss"] for line in at_once.metrics
    ]
    assert_same_tensors(checkpoint(tmp_path / "a", 12), checkpoint(tmp_path / "b", 12))
    assert names(tmp_path / "a") == ["iter_0000004", "iter_0000008.set_aside", "iter_0000012"]


def test_without_a_checkpoint_from_before_nothing_is_touched(tmp_path):
    short = DENSE | {"training.train_iters": 3}
    train(tmp_path / "a", short)
    message = r"iter_0000003 has trained on the batches of step 2-3, which .* no checkpoint from"
    option = {"training.skip_batches": "[2-3]", "training.train_iters": 6}
    with pytest.raises(RuntimeError, match=message):
        train(tmp_path / "a", DENSE | option)
    assert names(tmp_path / "a") == ["iter_0000003"]
    with pytest.raises(RuntimeError, match=message):
        train(tmp_path / "b", DENSE | option | {"checkpoint.load": checkpoint(tmp_path / "a", 3)})
