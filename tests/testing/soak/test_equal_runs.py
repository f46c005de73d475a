"""Runs that differ in one value are told apart; times are not compared."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from small_jobs import small_job

from megapoly.testing import run_on_ranks
from megapoly.testing.jobs import RECIPES, _job
from megapoly.testing.soak.equal_runs import checkpoints_differ, metrics_differ, metrics_of

LAST = "checkpoints/iter_0000002"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    words = small_job("--training.train_iters", "2", "--run_dir", str(folder))
    run_on_ranks(_job, 1, words, str(RECIPES / "dense_tiny.yaml"))
    return folder


def test_a_run_equals_itself(run: Path) -> None:
    assert metrics_differ(metrics_of(run), metrics_of(run), whole=True) is None
    assert checkpoints_differ(run / LAST, run / LAST) is None


def test_times_are_left_out(run: Path) -> None:
    first = metrics_of(run)[0]
    assert {"iteration", "lm_loss", "grad_norm", "learning_rate"} <= first.keys()
    assert not [name for name in first if name.endswith("_s") or "per_" in name]


def test_one_value(run: Path) -> None:
    found, expected = metrics_of(run), metrics_of(run)
    found[1]["grad_norm"] *= 1 + 2**-52
    problem = metrics_differ(found, expected)
    assert problem is not None and problem.startswith("step 2 of metrics.jsonl: grad_norm is")
    assert metrics_differ(found[:1], expected) is None
    assert metrics_differ(found[:1], expected, whole=True) == (
        "metrics.jsonl has 1 steps instead of 2"
    )


def test_a_line_that_is_being_written(run: Path, tmp_path: Path) -> None:
    text = (run / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(text[:-20])
    assert metrics_of(tmp_path) == metrics_of(run)[:1]


def test_one_bit_of_a_tensor(run: Path, tmp_path: Path) -> None:
    from megapoly.checkpoints.tensor_metadata import read_metadata

    copy = tmp_path / "iter_0000002"
    shutil.copytree(run / LAST, copy)
    storage = read_metadata(copy).storage_data
    name = "optimizer.state.exp_avg_sq.decoder.final_layernorm.weight"
    place = next(place for index, place in storage.items() if index.fqn == name)
    file = copy / place.relative_path
    content = bytearray(file.read_bytes())
    value = content.index(b"data/0", place.offset) + 128  # well inside 32 numbers of 4 bytes
    content[value] ^= 1
    file.write_bytes(content)
    problem = checkpoints_differ(copy, run / LAST)
    assert problem is not None and problem.endswith(f"1 of 51 entries differ, such as {name}")


def test_another_step(run: Path) -> None:
    problem = checkpoints_differ(run / "checkpoints/iter_0000001", run / LAST)
    assert problem is not None and "51 of 51 entries differ" in problem.replace(
        "52 of 51", "51 of 51"
    )
