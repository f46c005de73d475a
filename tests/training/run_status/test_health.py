"""Judgements on a run, at times that the tests choose."""

from dataclasses import replace

import pytest

from megapoly.platform.identity import own_identity
from megapoly.training.run_status.health import CLOCK_SKEW_S, duration, health_of
from megapoly.training.run_status.record import RunStatus

NOW = 1_000_000.0
TRAINING = RunStatus(
    "runs/a",
    state="training",
    phase="step",
    step=37,
    train_iters=240,
    started=NOW - 900,
    last_step=NOW - 3,
    expected_by=NOW + 57,
    host="n1",
    pid=7,
)


def judged(now=NOW, **values):
    health = health_of(replace(TRAINING, **values), now)
    return health.is_well, health.state, health.sentence


def test_a_run_that_advances():
    assert judged() == (True, "training", "training after step 37 of 240, 3 s ago")
    assert judged(state="starting", phase="loading of the checkpoint", last_step=None) == (
        True,
        "starting",
        "starting (loading of the checkpoint), for 15 min",
    )


def test_a_run_that_is_late_is_silent_once_clocks_cannot_be_the_reason():
    assert judged(NOW + 57 + CLOCK_SKEW_S)[0]
    is_well, state, sentence = judged(NOW + 57 + CLOCK_SKEW_S + 1)
    assert (is_well, state) == (False, "silent")
    assert sentence == (
        "no sign of life for 2 min, 61 s longer than it may be silent: process 7 on n1 was "
        "training after step 37 of 240; see whether it and its host are up"
    )


def test_a_run_resumed_a_day_after_its_last_step_has_not_been_silent_for_a_day():
    sentence = judged(NOW + 200, last_step=NOW - 86_400, started=NOW, expected_by=NOW + 60)[2]
    assert sentence.startswith("no sign of life for 3 min, 2 min longer") or "200 s" in sentence


def test_the_clock_of_the_writer_may_be_ahead():
    assert judged(NOW - 50) == (True, "training", "training after step 37 of 240, 0 s ago")


def test_without_a_limit_nothing_is_late():
    is_well, _, sentence = judged(NOW + 1e6, expected_by=None)
    assert is_well and sentence.endswith("how long it may be silent is not limited")


def test_a_run_whose_process_is_gone_is_dead_at_once():
    gone = replace(own_identity(), pid=2**22 + 1)
    is_well, state, sentence = judged(process=gone)
    assert (is_well, state) == (False, "dead")
    assert sentence.startswith("ended without a word while training after step 37 of 240: process")
    assert judged(process=own_identity())[0]
    assert judged(process=replace(gone, boot_id="elsewhere"))[0]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (dict(state="complete", step=240), (True, "complete", "complete after step 240")),
        (dict(state="stopped"), (True, "stopped", "stopped on request after step 37 of 240")),
        (
            dict(state="failed", exit_status=3, message="loss is\n  nan"),
            (False, "failed", "failed with status 3 after step 37 of 240: loss is nan"),
        ),
    ],
)
def test_ends_do_not_age(values, expected):
    gone = replace(own_identity(), pid=2**22 + 1)
    assert judged(NOW + 1e9, expected_by=None, process=gone, **values) == expected


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-5, "0 s"), (0.4, "0 s"), (119.4, "119 s"), (119.6, "2 min"), (7199, "119 min")]
    + [(7200, "2 h 0 min"), (172_799, "47 h 59 min"), (172_800, "2 d 0 h"), (1e6, "11 d 13 h")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text
