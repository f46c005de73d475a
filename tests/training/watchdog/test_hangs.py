"""Real jobs of which one rank stops advancing: who is named, what is written, how they end."""

from __future__ import annotations

import json
from pathlib import Path

import hanging_jobs as jobs
import pytest
from processes import wait_until

from megapoly.platform.launcher import HUNG
from megapoly.training.watchdog.evidence import Report, process

TENSOR_PARALLEL = {"parallel.tensor_model_parallel_size": 2}
PIPELINE = {"parallel.pipeline_model_parallel_size": 2}


def folder_of(run: Path) -> Path:
    (folder,) = (run / "run" / "diagnostics").iterdir()
    return folder


def hang_lines(ended: jobs.Ended) -> list[str]:
    return [line for line in ended.output.splitlines() if line.startswith("hang: ")]


@pytest.mark.parametrize(("layout", "num_ranks", "behind"), [(TENSOR_PARALLEL, 4, 3), ({}, 2, 0)])
def test_a_rank_that_never_reaches_its_collective(tmp_path, layout, num_ranks, behind) -> None:
    ended = jobs.run(tmp_path, layout, num_ranks, jobs.hang_in_step, behind, jobs.never_return)
    assert ended.statuses == [HUNG] * num_ranks == [4] * num_ranks
    (line,) = hang_lines(ended)
    assert f"rank {behind} (pid " in line and " is behind: silent for " in line
    assert "in step 3" in line and " in all_reduce #" in line
    assert line.endswith("the job ends with status 4")

    folder = folder_of(tmp_path)
    assert f"of {num_ranks} of {num_ranks} ranks are in {folder};" in line
    names = {path.name for path in folder.iterdir()}
    for rank in range(num_ranks):
        assert {f"rank_{rank}.{kind}" for kind in ("stack", "flight.json", "json")} <= names
        stack = (folder / f"rank_{rank}.stack").read_text()
        assert ("in never_return" in stack) == (rank == behind)
        assert ("in run_schedule" in stack) == (rank != behind)
        report = Report.from_json(json.loads((folder / f"rank_{rank}.json").read_text()))
        assert (report.waits, report.step) == (rank != behind, 3)
    summary = (folder / "summary.txt").read_text().splitlines()
    assert line.startswith(summary[0]) and len(summary) == 2 + num_ranks


def test_a_stopped_rank_of_a_pipeline(tmp_path) -> None:
    ended = jobs.run(tmp_path, PIPELINE, 2, jobs.hang_in_step, 1, jobs.stop)
    assert ended.statuses == [HUNG] * 2  # continued, and ended before it goes on
    (line,) = hang_lines(ended)
    assert "rank 1 (pid " in line and " is behind: stopped by SIGSTOP" in line
    assert "rank 0 waits in send_forward" in line
    assert "in never_return" not in (folder_of(tmp_path) / "rank_1.stack").read_text()


def test_one_process_alone_whose_data_worker_is_stopped(tmp_path) -> None:
    options = {"data.num_workers": 1}
    ended = jobs.run(tmp_path, options, 1, jobs.hang_in_data_worker, 0, jobs.stop)
    assert ended.statuses == [HUNG]
    (line,) = hang_lines(ended)
    assert "is waiting for its data worker" in line and "which is stopped" in line
    stack = (folder_of(tmp_path) / "rank_0.stack").read_text()
    assert "/torch/utils/data/dataloader.py" in stack
    worker = stack.rpartition("pt_data_worker, pid ")[2].partition(",")[0]
    wait_until(lambda: (its := process(int(worker))) is None or its.state == "Z")


def test_a_data_worker_that_hangs_has_its_stack_written(tmp_path) -> None:
    options = {"data.num_workers": 1}
    ended = jobs.run(tmp_path, options, 2, jobs.hang_in_data_worker, 1, jobs.never_return)
    assert ended.statuses == [HUNG] * 2
    (line,) = hang_lines(ended)
    assert "rank 1 (pid " in line and " is behind: waiting for its data worker (" in line
    stack = (folder_of(tmp_path) / "rank_1.stack").read_text()
    assert "in never_return" in stack.partition("pt_data_worker, pid ")[2]


def test_a_rank_that_hangs_at_the_start(tmp_path) -> None:
    ended = jobs.run(tmp_path, {}, 2, jobs.hang_in_data, 1, jobs.never_return)
    assert ended.statuses == [HUNG] * 2
    (line,) = hang_lines(ended)
    assert "rank 1 (pid " in line and "in opening of the data" in line and "rank 0 waits" in line


@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize("act", [jobs.never_return, jobs.stop])
def test_a_rank_that_hangs_while_it_saves(tmp_path, in_background, act) -> None:
    options = {"checkpoint.save": True, "checkpoint.save_interval": 2}
    options["checkpoint.async_save"] = in_background
    ended = jobs.run(tmp_path, options, 2, jobs.hang_in_save, 1, act)
    assert ended.statuses == [HUNG] * 2, ended.output
    (line,) = hang_lines(ended)
    assert "rank 1 (pid " in line and "in saving after step" in line
    (left,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert left.name == ".iter_0000002.partial"


def test_a_watcher_ends_with_its_rank(tmp_path) -> None:
    """`run` waits for it; without a hang nothing is written."""
    ended = jobs.run(tmp_path, {}, 1, jobs.hang_in_step, 0, jobs.die)
    assert ended.statuses == [-9]
    ended = jobs.run(tmp_path, {}, 1, jobs.hang_in_step, 1, jobs.die)
    assert ended.statuses == [0] and ended.output == ""
    assert not (tmp_path / "run" / "diagnostics").exists()


def test_no_watcher_is_started_when_it_is_disabled(tmp_path) -> None:
    options = {"parallel.hang_timeout_s": 0}
    ended = jobs.run(tmp_path, options, 1, jobs.note_watchers, tmp_path)
    assert ended.statuses == [0] and ended.output == "watchers: 0\n"
    ended = jobs.run(tmp_path, {"training.train_iters": 7}, 1, jobs.note_watchers, tmp_path)
    assert ended.statuses == [0] and ended.output == "watchers: 0\nwatchers: 1\n"
