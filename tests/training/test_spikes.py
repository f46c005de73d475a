"""When a value is a spike, what is remembered, and how many steps may be skipped."""

import json
import math

import numpy as np
import pytest

from megapoly.config.schema import TrainingConfig
from megapoly.training.spikes import RecentSteps

SETTINGS = TrainingConfig(spike_threshold=5.0, spike_window=16, spike_max_skips=3)


def steps_with(values, settings=SETTINGS):
    steps = RecentSteps(settings)
    for step, value in enumerate(values, start=1):
        steps.add(step, {"lm_loss": value, "grad_norm": 1.0})
    return steps


def largest_ordinary(values, threshold):
    """By numpy, of the last 16 values."""
    recent = np.array(values[-16:])
    middle = np.median(recent)
    sigma = max(1.4826 * np.median(np.abs(recent - middle)), 0.01 * abs(middle))
    return middle + threshold * sigma


@pytest.mark.parametrize("num_steps", [8, 9, 16, 40])
def test_threshold_is_median_and_deviation_of_the_window(num_steps):
    values = np.random.RandomState(num_steps).normal(3.0, 0.2, num_steps).tolist()
    steps = steps_with(values)
    largest = largest_ordinary(values, 5.0)
    assert steps.compare({"lm_loss": largest * (1 - 1e-12)}) == []
    (found,) = steps.compare({"lm_loss": largest * (1 + 1e-12), "grad_norm": 1.0})
    assert found.name == "lm_loss" and found.is_finite
    assert found.threshold == pytest.approx(largest, rel=1e-13)
    assert found.median == pytest.approx(np.median(values[-16:]), rel=1e-13)


def test_a_value_far_below_is_ordinary():
    assert steps_with([3.0, 3.1] * 8).compare({"lm_loss": -1e9, "grad_norm": 0.0}) == []


def test_equal_values_leave_room_of_one_percent_a_sigma():
    steps = steps_with([2.0] * 16)
    assert steps.compare({"lm_loss": 2.0999}) == []
    assert [str(each) for each in steps.compare({"lm_loss": 2.1001})] == [
        "lm_loss 2.1001 (median of 16 steps 2, threshold 2.1)"
    ]


def test_before_half_of_the_window_is_known_only_finite_matters():
    steps = steps_with([1.0] * 7)
    assert steps.compare({"lm_loss": 1e30, "z_loss": 1e30}) == []
    for value in (math.nan, math.inf, -math.inf):
        (found,) = steps.compare({"lm_loss": value, "grad_norm": 1.0})
        assert not found.is_finite and found.name == "lm_loss"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_finite_is_unusual(value):
    (found,) = steps_with([1.0] * 16).compare({"grad_norm": value, "lm_loss": 1.0})
    assert not found.is_finite and found.name == "grad_norm"


def test_spikes_that_were_trained_on_do_not_hide_the_next():
    steps = steps_with([3.0, 3.1] * 8)
    for step in range(17, 20):
        assert steps.compare({"lm_loss": 300.0})
        steps.add(step, {"lm_loss": 300.0, "grad_norm": 1.0}, is_unusual=True)
    assert steps.compare({"lm_loss": 300.0})


def test_a_new_level_becomes_ordinary_when_it_fills_half_of_the_window():
    steps, count = steps_with([3.0, 3.1] * 8), 0
    while steps.compare({"lm_loss": 6.0}):
        count += 1
        steps.add(16 + count, {"lm_loss": 6.0, "grad_norm": 1.0}, is_unusual=True)
    assert count == 8


def test_skips_are_counted_in_the_last_steps():
    steps = steps_with([1.0] * 16)
    assert [steps.skip(step) for step in (17, 20, 21, 22)] == [True, True, True, False]
    assert steps.num_skipped == 3
    # Of 16 steps up to step 33, the one at 17 is not one.
    assert steps.skip(33) and not steps.skip(34)
    assert steps.num_skipped == 4


def test_checkpoints_near_an_unusual_step_are_not_ordinary():
    steps = steps_with([1.0] * 16)
    assert steps.is_ordinary(16) and steps.first_unusual_after(0) is None
    steps.add(17, {"lm_loss": 9.0, "grad_norm": 1.0}, is_unusual=True)
    steps.skip(30)
    assert not steps.is_ordinary(30) and not steps.is_ordinary(39) and steps.is_ordinary(40)
    assert [steps.first_unusual_after(step) for step in (0, 17, 30)] == [17, 30, None]


def test_state_is_restored_to_the_bit():
    values = np.random.RandomState(0).lognormal(0, 3, 20).tolist()
    steps = steps_with(values)
    steps.add(21, {"lm_loss": 1e9 / 3, "grad_norm": 0.1 + 0.2}, is_unusual=True)
    steps.skip(22)
    state = steps.state()
    text = json.dumps(state, allow_nan=False)
    restored = RecentSteps(SETTINGS)
    restored.restore(json.loads(text), with_values=True)
    assert restored.state() == state and restored.num_skipped == 1
    for value in np.linspace(0, 300, 50):
        assert restored.compare({"lm_loss": value}) == steps.compare({"lm_loss": value})
    steps.add(23, {"lm_loss": 1.0, "grad_norm": 1.0})
    assert json.dumps(state) == text  # what is being saved does not follow the run

    anew = RecentSteps(SETTINGS)
    anew.restore(json.loads(text), with_values=False)
    assert anew.state() == state | {"values": {}}


def test_a_smaller_window_takes_the_newest_values():
    steps = RecentSteps(TrainingConfig(spike_window=4))
    steps.restore(steps_with([float(i) for i in range(16)]).state(), with_values=True)
    assert steps.state()["values"]["lm_loss"] == [12.0, 13.0, 14.0, 15.0]
