"""How long a rank may be silent, and what counts as silence; no clock is read."""

from __future__ import annotations

import pytest

from megapoly.config import Config
from megapoly.training.watchdog import heartbeat
from megapoly.training.watchdog.heartbeat import Limits
from megapoly.training.watchdog.watcher import Silence


def limits(**parallel: float) -> Limits:
    config = Config()
    for name, value in parallel.items():
        setattr(config.parallel, name, value)
    return Limits(config)


@pytest.mark.parametrize(
    ("median_s", "expected"), [(0.5, 60.0), (6.0, 60.0), (20.0, 200.0), (100.0, 480.0)]
)
def test_ten_times_the_median_step_within_bounds(median_s: float, expected: float) -> None:
    its = limits()
    for step_time_s in (1000.0, 1000.0):  # they compile
        assert its.step_s == 480.0
        its.add_step(step_time_s)
    for step_time_s in (median_s, 5000.0, median_s, 0.01, median_s):
        its.add_step(step_time_s)
    assert its.step_s == expected


def test_the_limit_that_is_given_holds_in_steps_after_the_first() -> None:
    its = limits(hang_timeout_s=7.0, distributed_timeout_minutes=1.0)
    assert its.step_s == its.slow_s == 48.0
    for _ in range(3):
        its.add_step(100.0)
    assert its.step_s == 7.0
    assert limits(hang_timeout_s=9000.0).slow_s == 9000.0  # of one process


def test_the_diagnosis_ends_before_collectives_fail() -> None:
    for minutes in (0.1, 1.0, 10.0, 60.0):
        its = limits(distributed_timeout_minutes=minutes)
        assert its.slow_s + its.collect_s < 60 * minutes


def test_silence_is_counted_while_the_watcher_runs() -> None:
    silence = Silence()
    assert silence.look((1, 0), 1.0, 1.0) == 0.0
    assert silence.look((1, 0), 1.0, 1.1) == 1.1
    # Suspended for an hour with its rank, which cannot have advanced.
    assert silence.look((1, 0), 1.0, 3600.0) == pytest.approx(3.1)
    assert silence.look((1, 5), 1.0, 1.0) == 0.0  # it writes
    assert silence.look((2, 5), 1.0, 1.0) == 0.0


def test_phases_end_where_they_began(monkeypatch) -> None:
    beats = heartbeat.Beats(file := heartbeat.new_file())
    monkeypatch.setattr(heartbeat, "_heartbeat", heartbeat.Heartbeat(beats, limits()))
    heartbeat.begin_step(3)
    before = beats.read()
    assert (before.phase, before.step, before.uses_files, before.waits) == ("step", 3, False, False)
    with heartbeat.during("saving"):
        inside = beats.read()
        assert (inside.phase, inside.limit_s, inside.uses_files) == ("saving", 480.0, True)
        heartbeat.waits(True)
        assert beats.read().waits
        heartbeat.waits(False)
    after = beats.read()
    assert (after.phase, after.limit_s, after.uses_files) == (before.phase, before.limit_s, False)
    assert before.beats < inside.beats < after.beats
    heartbeat.beat()
    assert beats.read().beats == after.beats + 1
    beats.close()
    heartbeat.os.close(file)


def test_a_process_that_is_not_watched_has_no_heartbeat() -> None:
    assert heartbeat.current() is None
    heartbeat.beat()
    heartbeat.begin("nothing")
    heartbeat.begin_step(1)
    heartbeat.end_step(1.0)
    with heartbeat.during("nothing"), heartbeat.meeting():
        pass
