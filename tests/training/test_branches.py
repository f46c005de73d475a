"""Runs that start from another run's checkpoint of the stable phase of WSD.

The schedule of every run is 0, 0.25, 0.5, .., 0.5, and then a line to 0.05 over its last two steps.
"""

import shutil

import pytest
from resuming_jobs import checkpoint, train

WSD = {
    "optimizer.lr_decay_style": "WSD",
    "optimizer.lr_wsd_decay_iters": 2,
    "checkpoint.save_interval": 2,
}
WARMUP, HIGH, LOW, DECAY = [0.0, 0.25], 0.5, 0.05, 2


def schedule(steps):
    """Return the rates of a run; step n has the rate after n - 1 steps."""
    falling = [HIGH - (HIGH - LOW) * k / DECAY for k in range(DECAY)]
    return [*WARMUP, *[HIGH] * (steps - len(WARMUP) - DECAY), *falling]


@pytest.fixture(scope="module")
def trunk(tmp_path_factory):
    """A run of 8 steps, stable until 6, with checkpoints after 2, 4, 6 and 8."""
    run_dir = tmp_path_factory.mktemp("trunk")
    return run_dir, train(run_dir, WSD | {"training.train_iters": 8})


def test_trunk(trunk):
    assert trunk[1].column("learning_rate") == pytest.approx(schedule(8))


def branch(trunk, run_dir, *, start, end):
    options = {"checkpoint.load": checkpoint(trunk[0], start), "training.train_iters": end}
    return train(run_dir, WSD | options)


def test_decays_from_a_stable_checkpoint_also_when_it_stops_between(trunk, tmp_path):
    job = branch(trunk, tmp_path, start=4, end=6)
    assert job.column("iteration") == [5, 6]
    assert job.column("consumed_tokens") == [5 * 64, 6 * 64]
    assert job.column("learning_rate") == pytest.approx(schedule(6)[4:])
    # The first step of a decay still has the stable rate: the trunk's step, to the bit.
    assert job.metrics[0]["lm_loss"] == trunk[1].metrics[4]["lm_loss"]
    assert job.metrics[0]["grad_norm"] == trunk[1].metrics[4]["grad_norm"]
    changes = "`optimizer.lr_decay_iters` 8 -> 6, `training.train_iters` 8 -> 6"
    assert f"changed since the checkpoint: {changes}" in job.printed
    assert not any("learning rate of step" in line for line in job.printed)  # it does not jump

    # Its own checkpoint comes before `checkpoint.load`, and is inside its decay.
    shutil.rmtree(checkpoint(tmp_path, 6))
    longer = WSD | {"optimizer.lr_wsd_decay_iters": 4, "training.train_iters": 8}
    train(tmp_path, longer | {"checkpoint.load": checkpoint(trunk[0], 4)})
    shutil.rmtree(checkpoint(tmp_path, 8))
    job = train(tmp_path, longer | {"checkpoint.load": checkpoint(trunk[0], 4)})
    assert f"loaded {checkpoint(tmp_path, 6)}, at step 6" in job.printed
    falling = [HIGH - (HIGH - LOW) * k / 4 for k in range(4)]
    assert job.column("learning_rate") == pytest.approx(falling)
    assert not any("changed" in line for line in job.printed)


def test_trains_on_from_a_stable_checkpoint(trunk, tmp_path):
    job = branch(trunk, tmp_path, start=6, end=11)
    assert job.column("learning_rate") == pytest.approx(schedule(11)[6:])
    assert job.metrics[0]["lm_loss"] == trunk[1].metrics[6]["lm_loss"]
    assert not any("learning rate of step" in line for line in job.printed)


def test_says_when_a_longer_run_leaves_the_decay(trunk, tmp_path):
    shutil.copytree(trunk[0], tmp_path, dirs_exist_ok=True)
    job = train(tmp_path, WSD | {"training.train_iters": 10})
    assert job.column("learning_rate")[8:] == pytest.approx(schedule(10)[8:])
    (line,) = [line for line in job.printed if line.startswith("learning rate of step")]
    assert line.startswith(
        "learning rate of step 9: 5.00e-01; by the checkpoint's schedule 5.00e-02. The checkpoint "
        "is inside the decay of WSD, after step 6: to train on at the stable rate"
    )
