"""Which rank is behind, from reports as watchers write them."""

from __future__ import annotations

import dataclasses
import json

import pytest

from megapoly.training.watchdog.evidence import Group, Process, Report
from megapoly.training.watchdog.verdict import conclude

SLEEP = [("/x/megapoly/training/step.py", 88, "compute_gradients")]
COLLECTIVE = [
    ("/x/torch/distributed/distributed_c10d.py", 2954, "all_reduce"),
    ("/x/megatron/core/distributed/param_and_grad_buffer.py", 519, "finish_grad_sync"),
    ("/x/megapoly/training/step.py", 170, "run_schedule"),
]


def report(rank: int, **changes: object) -> Report:
    """A rank in step 5, in no collective."""
    fixed = {"host": "n1", "pid": 100 + rank, "phase": "step", "step": 5, "silent_s": 61.0}
    values = fixed | {"limit_s": 60.0, "state": "S", "frames": SLEEP, "groups": {}} | changes
    return Report(rank=rank, **values)


def waiting(rank: int, **changes: object) -> Report:
    return report(rank, **{"frames": COLLECTIVE} | changes)


def conclusion(*reports: Report, world_size: int | None = None):
    # Through JSON, as between watchers.
    sent = [Report.from_json(json.loads(json.dumps(each.to_json()))) for each in reports]
    assert sent == list(reports)
    return conclude({each.rank: each for each in sent}, world_size or len(reports))


def test_the_rank_at_work_while_others_wait() -> None:
    found = conclusion(waiting(0), report(1), waiting(2))
    assert found.ranks == [1]
    assert found.sentence == (
        "hang: rank 1 (pid 101 on n1) is behind: silent for 61 s in step 5, at "
        "megapoly/training/step.py:88 in compute_gradients; ranks 0, 2 wait in all_reduce"
    )


def group(members: list[int], reached: int, waits_in: str = "") -> Group:
    return Group(members, "TP", reached, waits_in)


def test_the_end_of_a_chain_of_ranks_that_wait() -> None:
    """As on a GPU, whose stacks do not tell: 0 waits for 2 (data), 2 for 3 (tensor)."""
    found = conclusion(
        report(0, groups={"dp0": group([0, 2], 7, "all_reduce #7"), "tp0": group([0, 1], 40)}),
        report(1, groups={"dp1": group([1, 3], 7, "all_reduce #7"), "tp0": group([0, 1], 40)}),
        report(2, groups={"dp0": group([0, 2], 6), "tp1": group([2, 3], 40, "all_reduce #40")}),
        report(3, groups={"dp1": group([1, 3], 6), "tp1": group([2, 3], 39)}),
    )
    assert found.ranks == [3]
    assert "ranks 0, 1, 2 wait in all_reduce #7 of TP" in found.sentence


def test_a_rank_in_another_collective_than_its_group() -> None:
    found = conclusion(
        waiting(0, groups={"a": group([0, 1, 2], 5, "all_reduce #5")}),
        waiting(1, groups={"a": group([0, 1, 2], 4, ""), "b": group([1, 2], 1, "barrier #1")}),
        waiting(2, groups={"a": group([0, 1, 2], 5, "all_reduce #5"), "b": group([1, 2], 0)}),
    )
    assert found.ranks == [1, 2]  # each has not begun what the other waits in


def test_stopped_processes_are_certain() -> None:
    found = conclusion(report(0), waiting(1), report(2, state="T", frames=[], groups=None))
    assert found.ranks == [2] and "stopped by SIGSTOP" in found.sentence
    worker = Process(7, "pt_data_worker", "T")
    found = conclusion(report(0), report(1, workers=[worker]))
    assert found.ranks == [1] and "its data worker 7, which is stopped" in found.sentence


@pytest.mark.parametrize("state", ["S", "D"])
def test_a_process_alone(state: str) -> None:
    found = conclusion(report(0, state=state, phase="saving"))
    assert found.ranks == [0]
    assert found.sentence.startswith("hang: the process (pid 100 on n1) is ")
    assert "silent for 61 s in saving after step 5, at megapoly/" in found.sentence
    assert ("such as for a disk" in found.sentence) == (state == "D")


def test_a_rank_without_a_report() -> None:
    found = conclusion(waiting(0), waiting(1), world_size=4)
    assert found.ranks == [2, 3]
    assert "ranks 2, 3 may be behind: their watchers report nothing" in found.sentence


def test_an_earlier_step_is_behind() -> None:
    assert conclusion(waiting(0), waiting(1, step=4)).ranks == [1]


def test_ranks_that_wait_for_each_other_are_all_shown() -> None:
    found = conclusion(waiting(0), waiting(1))
    assert found.ranks == [] and "ranks 0, 1 in all_reduce" in found.sentence


def test_a_sentence_names_at_most_eight_ranks() -> None:
    many = [waiting(rank) for rank in range(64)]
    many[40] = dataclasses.replace(report(40), host="n6")
    sentence = conclusion(*many).sentence
    assert "rank 40 (pid 140 on n6) is behind" in sentence
    assert "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 55 more wait" in sentence
