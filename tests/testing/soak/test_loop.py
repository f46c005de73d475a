"""Faults from a fixed seed: nothing is lost, and what is lost is noticed."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from small_jobs import NUM_STEPS, small_job

from megapoly.testing.soak import kinds, loop
from megapoly.testing.soak.kinds import KINDS, Kind, Scene
from megapoly.testing.soak.loop import Outcome, Plan, Soak
from megapoly.testing.soak.report import Report

# Not "stop": a rank that is stopped is noticed after a time-out, which a busy machine reaches too.
QUICK = [name for name in KINDS if name != "stop"]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def soak(plan: Plan) -> list[Outcome]:
    return list(Soak(plan).outcomes())


def draw_each_kind_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw no kind again before every other one."""
    for name in QUICK:
        monkeypatch.setitem(KINDS, name, replace(KINDS[name], number=1))


def assert_survived(outcomes: list[Outcome], num_faults: int) -> None:
    report = Report(outcomes)
    assert report.findings() == []
    assert report.num_faults == num_faults
    assert any(outcome.kind is None for outcome in outcomes), "no complete run was compared"


@pytest.mark.timeout(3600)  # a machine with 30 processes to run a core has needed 7 minutes
def test_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kind of fault strikes three times."""
    draw_each_kind_once(monkeypatch)
    outcomes = soak(Plan(small_job(), tmp_path, 1, 21, QUICK, seed=19))
    assert_survived(outcomes, 21)
    alone = {name for name in QUICK if KINDS[name].least_processes == 1}
    assert {outcome.kind for outcome in outcomes} == alone | {None}
    assert not list(tmp_path.glob("run_*")), "runs that were survived are deleted"


@pytest.mark.timeout(3600)
def test_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kind strikes once. Steps that meet NaN are left out, also in the run without faults."""
    job = small_job("--training.spike_action", "skip", "--parallel.use_distributed_optimizer=true")
    draw_each_kind_once(monkeypatch)
    plan = Plan(job, tmp_path, 2, len(QUICK), QUICK, seed=263, nan_steps=((3, 1), (9, 0)))
    outcomes = soak(plan)
    assert_survived(outcomes, len(QUICK))
    assert {outcome.kind for outcome in outcomes} == {*QUICK, None}
    lines = (tmp_path / "without_faults/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [*range(1, NUM_STEPS + 1)]
    assert [n for n, line in enumerate(lines, start=1) if "skipped_steps" in line] == [3, 9]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("new_processes", [False, True])
def test_every_kind(tmp_path: Path, new_processes: bool) -> None:
    job = small_job(
        "--parallel.tensor_model_parallel_size=2",
        "--parallel.hang_timeout_s=20",
        "--parallel.distributed_timeout_minutes=1",  # a rank may be stopped while it saves
    )
    every = sum(kind.number for kind in KINDS.values())
    number = len(KINDS) if new_processes else every
    plan = Plan(job, tmp_path, 2, number, [*KINDS], seed=1, new_processes=new_processes)
    assert_survived(soak(plan), number)


def kill_and(damage):
    def strike(scene: Scene) -> None:
        kinds._kill_all(scene)
        damage(scene)

    return Kind("killed and damaged", strike)


def lose_a_checkpoint(scene: Scene) -> None:
    shutil.rmtree(scene.run.checkpoints()[-1])


def change_a_loss(scene: Scene) -> None:
    file = scene.run.folder / "metrics.jsonl"
    first, *others = map(json.loads, file.read_text().splitlines())
    first["lm_loss"] += 1e-12
    file.write_text("".join(json.dumps(line) + "\n" for line in [first, *others]))


def leave_processes(scene: Scene) -> None:
    """Start a job, whose rank and its watcher are stopped: they do not end by themselves."""
    job = scene.start()
    scene.wait_for(lambda: len(scene.jobs.processes()) == 2, job)
    for pid in scene.jobs.processes():
        os.kill(pid, signal.SIGSTOP)
    loop._LEFTOVERS_S = 0.1


def train_other_data(scene: Scene) -> None:
    """Train the rest with another learning rate; metrics are repaired, checkpoints are not."""
    loop._LEFTOVERS_S = 30.0
    scene.argv = [*scene.argv, "--optimizer.lr", "1e-3"]
    job = scene.start()
    scene.end_of(job)
    shutil.copy(scene.run.reference.folder / "metrics.jsonl", scene.run.folder)


def test_what_is_lost_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_LEFTOVERS_S", loop._LEFTOVERS_S)  # changed by two of these
    damages = [lose_a_checkpoint, change_a_loss, leave_processes, train_other_data]
    for damage in damages:
        monkeypatch.setitem(KINDS, damage.__name__, kill_and(damage))
    names = [damage.__name__ for damage in damages]
    plan = Plan(small_job(), tmp_path, 1, len(names), names, seed=0)
    monkeypatch.setattr(Soak, "_kinds", lambda self: iter(names))
    *outcomes, last = soak(plan)
    one, two, three, four = (outcome.problem for outcome in outcomes)
    assert one is not None and "was saved, and the newest is" in one
    assert two is not None and two.startswith("step 1 of metrics.jsonl: lm_loss is")
    assert three is not None and three.startswith("2 processes are left")
    assert four is None and last.kind is None
    assert last.problem is not None and "entries differ, such as" in last.problem
    assert sorted(path.name for path in tmp_path.glob("run_*")) == [
        f"run_000{number}" for number in (1, 2, 3, 4)
    ]


def test_the_same_seed_draws_the_same(tmp_path: Path) -> None:
    plan = Plan([], tmp_path, 2, 100, QUICK, seed=3)
    draw = lambda plan: [name for name, _ in zip(Soak(plan)._kinds(), range(100))]  # noqa: E731, B905
    assert draw(plan) == draw(plan) != draw(replace(plan, seed=4))
    assert {*draw(plan)} == {*QUICK} and draw(plan)[:28].count("launcher") in range(2, 7)
