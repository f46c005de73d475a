"""Ranges of steps against sets of steps."""

import itertools

import pytest

from megapoly.config.step_ranges import (
    contain,
    joined,
    step_range,
    step_ranges,
    text_of_steps,
    until,
)


@pytest.mark.parametrize(
    ("entry", "steps"),
    [
        (7, range(7, 8)),
        ("7", range(7, 8)),
        ("7-9", range(7, 10)),
        (" 7 - 9 ", range(7, 10)),
        ("7-7", range(7, 8)),
    ],
)
def test_steps_of_an_entry(entry, steps):
    assert step_range(entry) == steps


@pytest.mark.parametrize(
    "entry", [0, -1, "0-3", "5-3", "a", "", "1-2-3", "1..3", "1.5", 2**31, "1-2147483648", "٣"]
)
def test_what_is_no_step(entry):
    assert step_range(entry) is None


def steps_of(ranges):
    return set(itertools.chain(*ranges))


def test_ranges_are_sets_of_steps():
    ends = [range(a, b + 1) for a in range(1, 6) for b in range(a, 6)]
    for ranges in itertools.product(ends, repeat=2):
        found = joined(ranges)
        assert steps_of(found) == steps_of(ranges)
        assert all(a.stop < b.start for a, b in itertools.pairwise(found))
        for step in range(7):
            assert steps_of(until(found, step)) == {i for i in steps_of(ranges) if i <= step}
        for other in ends:
            assert contain(found, [other]) == (set(other) <= steps_of(ranges))
        entries = text_of_steps(found).split(", ")
        assert step_ranges(entries) == found


def test_no_entries_are_no_steps():
    assert step_ranges(None) == step_ranges([]) == [] and text_of_steps([]) == ""
