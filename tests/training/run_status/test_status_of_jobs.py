"""What ``status.json`` says of real jobs, in their course and after every kind of end."""

import json
import time

import hanging_jobs
import spiking_jobs
import status_jobs
from spiking_jobs import DENSE, SKIP, Fault
from tiny_jobs import TINY

from megapoly.testing import run_job, run_on_ranks
from megapoly.testing.jobs import shared_cache
from megapoly.training.run_lock import sole_job
from megapoly.training.run_status.health import health_of
from megapoly.training.run_status.reading import read_run
from megapoly.training.run_status.record import read_status

OPTIONS = TINY | {"training.train_iters": 6, "checkpoint.save_interval": 4}
EVALUATED = {"training.eval_interval": 3, "training.eval_iters": 1}


def arguments(run_dir, **more):
    fixed = {"run_dir": run_dir, "data.cache_dir": shared_cache().name}
    return [f"--{name}={value}" for name, value in (OPTIONS | fixed | more).items()]


def test_a_complete_run(tmp_path):
    begin = time.time()
    lines = run_job("dense_tiny", tmp_path, OPTIONS | EVALUATED, num_ranks=2)
    status, last = read_status(tmp_path), lines[-1]
    assert (status.state, status.step, status.train_iters) == ("complete", 6, 6)
    assert status.loss == last["lm_loss"] and status.grad_norm == last["grad_norm"]
    assert status.learning_rate == last["learning_rate"]
    assert status.consumed_tokens == last["consumed_tokens"]
    assert status.step_time_s == last["step_time_s"]
    assert status.tokens_per_second == last["tokens_per_second"]
    assert status.validation == {"books": last["val/books/loss"]}
    assert (status.eta_s, status.spikes, status.skipped_steps) == (0.0, 0, 0)
    assert (status.world_size, status.layout, status.save_interval) == (2, "data 2", 4)
    saved = tmp_path / "checkpoints" / "iter_0000006"
    assert (status.checkpoint.path, status.checkpoint.step) == (str(saved), 6)
    assert begin < status.started < status.last_step < status.updated < time.time()
    assert status.checkpoint.time == (saved / "run.json").stat().st_mtime
    assert sorted(path.name for path in tmp_path.iterdir() if "status" in path.name) == [
        "status.json"
    ]


def test_every_line_has_its_time_and_they_are_in_order(tmp_path):
    begin = time.time()
    times = [line["time"] for line in run_job("dense_tiny", tmp_path, OPTIONS)]
    assert len(times) == 6 and begin < times[0] < times[-1] < time.time()
    assert times == sorted(times) and all(round(each, 3) == each for each in times)


def test_a_run_that_is_started_again_knows_its_last_step(tmp_path):
    lines = run_job("dense_tiny", tmp_path, OPTIONS | EVALUATED)
    first = read_status(tmp_path)
    run_job("dense_tiny", tmp_path, OPTIONS | EVALUATED)  # nothing is left to train
    again = read_status(tmp_path)
    assert again.started > first.started and again.pid != first.pid
    assert (again.state, again.step, again.loss) == ("complete", 6, lines[-1]["lm_loss"])
    assert again.last_step == lines[-1]["time"] and again.validation == first.validation
    assert again.checkpoint == first.checkpoint


def test_the_state_in_an_evaluation_has_the_step_before_it(tmp_path):
    argv = arguments(tmp_path, **EVALUATED)
    (seen,) = run_on_ranks(status_jobs.seen_in_evaluation, 1, argv, tmp_path)
    assert (seen["state"], seen["phase"], seen["step"]) == ("evaluating", "evaluation", 3)
    assert seen["started"] < seen["last_step"] < seen["updated"]
    # 80 % of 10 minutes, less the time for which the rank has been silent.
    assert 400 < seen["expected_by"] - seen["updated"] <= 480


def test_without_a_watch_for_hangs_nothing_is_expected(tmp_path):
    argv = arguments(tmp_path, **EVALUATED, **{"parallel.hang_timeout_s": 0})
    (seen,) = run_on_ranks(status_jobs.seen_in_evaluation, 1, argv, tmp_path)
    assert (seen["state"], seen["expected_by"]) == ("evaluating", None)


def test_a_run_that_is_requested_to_stop(tmp_path):
    run_on_ranks(status_jobs.stopped, 1, arguments(tmp_path), 3)
    status = read_status(tmp_path)
    # The ranks agree to stop at the beginning of a step, here of the next.
    assert (status.state, status.step, status.checkpoint.step) == ("stopped", 4, 4)
    assert health_of(status, time.time()).is_well


def test_spikes_and_skipped_steps_are_those_of_the_run(tmp_path):
    skips = spiking_jobs.train(tmp_path, DENSE | SKIP, Fault("loss", (4,), factor=50.0))
    assert [line.get("spike") for line in skips.metrics].count(True) == 1
    status = read_status(tmp_path)
    assert (status.state, status.spikes, status.skipped_steps) == ("complete", 1, 1)
    spiking_jobs.train(tmp_path, DENSE | SKIP | {"training.train_iters": 8})
    status = read_status(tmp_path)
    assert (status.step, status.spikes, status.skipped_steps) == (8, 1, 1)


def test_a_run_that_diverges(tmp_path):
    job = spiking_jobs.train(tmp_path, DENSE, Fault("loss", (4,)))
    status = read_status(tmp_path)
    assert (status.state, status.step, status.exit_status) == ("failed", 3, 3)
    assert status.message == job.errors[0] and "not finite" in status.message


def test_a_rank_that_fails(tmp_path):
    ended = hanging_jobs.run(tmp_path, {}, 2, hanging_jobs.hang_in_step, 1, hanging_jobs.fail)
    status = read_status(tmp_path / "run")
    assert status.message == "rank 1 failed: RuntimeError: a defect"
    assert (status.state, status.step, status.exit_status) == ("failed", 2, ended.statuses[0])


def test_a_run_that_hangs(tmp_path):
    ended = hanging_jobs.run(
        tmp_path, {}, 2, hanging_jobs.hang_in_step, 1, hanging_jobs.never_return
    )
    status = read_status(tmp_path / "run")
    assert ended.statuses == [4, 4]
    assert (status.state, status.exit_status) == ("failed", 4)
    assert status.message.startswith("hang: rank 1 (pid ") and status.message in ended.output


def test_a_run_that_is_killed_is_dead_for_a_reader_of_its_host(tmp_path):
    ended = hanging_jobs.run(tmp_path, {}, 1, hanging_jobs.hang_in_step, 0, hanging_jobs.die)
    assert ended.statuses == [-9]
    seen = read_run(tmp_path / "run", time.time())
    assert seen.status.is_running and not seen.health.is_well
    assert seen.health.state == "dead" and "ended without a word" in seen.health.sentence


def test_a_job_that_is_refused_leaves_the_file_to_the_other(tmp_path):
    (tmp_path / "status.json").write_text("the other's")
    with sole_job(tmp_path):
        (error,) = run_on_ranks(status_jobs.refused, 1, arguments(tmp_path))
    assert "One job at a time" in error
    assert (tmp_path / "status.json").read_text() == "the other's"


def test_a_folder_in_the_place_of_the_file_costs_one_warning(tmp_path):
    (tmp_path / "status.json" / "in the way").mkdir(parents=True)
    job = spiking_jobs.train(tmp_path, OPTIONS)
    assert len(job.metrics) == 6
    warnings = [line for line in job.printed if "status.json cannot be written" in line]
    assert len(warnings) <= 1  # the first may come before the run prints
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["iteration"] == 6
