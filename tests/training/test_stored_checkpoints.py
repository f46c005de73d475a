"""A run goes on from its store on a host with an empty disk, and starts from checkpoints there."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import fsspec
import pytest
import tiny_jobs
import torch.distributed as dist
from made_checkpoints import make_checkpoint

from megapoly.checkpoints.object_store import upload
from megapoly.checkpoints.run_folder import checkpoint_path
from megapoly.config import Config
from megapoly.config.schema import ModelConfig
from megapoly.errors import CheckpointError
from megapoly.testing import run_job
from megapoly.training.rank_zero_first import RankZeroFirst
from megapoly.training.stored_checkpoints import copy_from_stores

TINY = tiny_jobs.TINY | {
    "training.train_iters": 4,
    "optimizer.lr_decay_iters": 10,
    "checkpoint.save_interval": 2,
}


def losses(lines: list[dict[str, float]]) -> list[float]:
    return [line[name] for line in lines for name in ("iteration", "lm_loss", "grad_norm")]


def test_a_run_goes_on_on_a_host_with_an_empty_disk(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/store/run"
    stored = TINY | {"checkpoint.upload": url}
    run_job("dense_tiny", tmp_path / "first", stored)
    shutil.rmtree(tmp_path / "first")
    longer = {"training.train_iters": 6}
    resumed = run_job("dense_tiny", tmp_path / "second", stored | longer, num_ranks=2)
    load = {"checkpoint.load": f"{url}/checkpoints/iter_0000004"}
    caches = {"data.cache_dir": tmp_path / "cache"}
    loaded = run_job("dense_tiny", tmp_path / "third", TINY | longer | load | caches, num_ranks=2)
    whole = run_job("dense_tiny", tmp_path / "whole", TINY | longer)
    assert [line["iteration"] for line in resumed] == [5, 6]
    assert losses(resumed) == losses(loaded) == pytest.approx(losses(whole[4:]), rel=1e-5)
    in_store = {path.name for path in (tmp_path / "store/run/checkpoints").iterdir()}
    assert in_store >= {"iter_0000004", "iter_0000006"}


@pytest.fixture
def url(tmp_path: Path) -> str:
    """Return the URL of a run in a store with two checkpoints."""
    url = f"file://{tmp_path}/store/run"
    for step in (6, 9):
        upload(make_checkpoint(checkpoint_path(tmp_path / "made", step)), url)
    return url


def copied(config: Config) -> Path | None:
    """Return what a job of one process gets."""
    with RankZeroFirst(
        dist.HashStore(),
        rank=0,
        world_size=1,
        local_rank=0,
        cache_dir=Path(config.run_dir) / "cache",
        timeout_s=10.0,
    ) as rank_zero_first:
        return copy_from_stores(config, rank_zero_first)


def names(run_dir: str) -> list[str]:
    return sorted(path.name for path in Path(run_dir, "checkpoints").glob("*"))


@pytest.fixture
def config(tmp_path: Path, url: str) -> Config:
    config = Config(run_dir=str(tmp_path / "run"))
    config.checkpoint.upload = url
    return config


def test_the_newest_is_copied_and_a_line_says_so(
    config: Config, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert copied(config) is None and names(config.run_dir) == ["iter_0000009"]
    assert f"resumes from iter_0000009, copied from {url} and verified" in caplog.text
    shutil.rmtree(checkpoint_path(Path(url.removeprefix("file://")), 9))
    copied(config)  # the run has its own: the store is not asked
    assert names(config.run_dir) == ["iter_0000009"]


@pytest.mark.parametrize("is_missing", [True, False])
def test_a_damaged_one_is_passed_over(
    is_missing: bool, config: Config, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = checkpoint_path(Path(url.removeprefix("file://")), 9) / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.unlink() if is_missing else file.write_bytes(data)
    copied(config)
    assert names(config.run_dir) == ["iter_0000006"]
    assert "iter_0000009: " in caplog.text and "iter_0000006 is used" in caplog.text
    file = checkpoint_path(Path(url.removeprefix("file://")), 6) / "config.yaml"
    file.write_text(file.read_text() + "#")
    shutil.rmtree(config.run_dir)
    with pytest.raises(CheckpointError, match="has no checkpoint that is whole"):
        copied(config)
    assert names(config.run_dir) == []


def test_a_run_that_may_not_resume_or_is_another_is_refused(config: Config, url: str) -> None:
    config.checkpoint.resume = False
    with pytest.raises(CheckpointError, match=r"`checkpoint\.resume` is false .* iter_0000009"):
        copied(config)
    config.checkpoint.resume = True
    config.model = ModelConfig(num_layers=7)
    with pytest.raises(CheckpointError, match=r"is another run's: .*`model\.num_layers` is 7"):
        copied(config)
    assert names(config.run_dir) == []
    config.checkpoint.upload = f"{url}/absent"
    assert copied(config) is None


def test_a_checkpoint_to_start_from_is_copied_once(
    config: Config, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.checkpoint.upload, config.checkpoint.load = None, f"{url}/checkpoints/iter_0000006"
    copy = copied(config)
    assert copy is not None and copy.name == "iter_0000006" and not names(config.run_dir)
    store, _ = fsspec.url_to_fs(url)
    with monkeypatch.context() as patch:
        patch.setattr(type(store), "get_file", None)
        assert copied(config) == copy
    (copy / "common.pt").write_bytes(b"")  # by a disk that was full
    assert copied(config) == copy and (copy / "common.pt").stat().st_size > 0
    config.checkpoint.load = url
    newest = copied(config)
    assert newest is not None and newest.name == "iter_0000009"
    make_checkpoint(checkpoint_path(Path(config.run_dir), 3))
    config.checkpoint.load = f"{url}/absent"
    assert copied(config) is None  # the run resumes from its own


def test_room_is_looked_at_before_the_copy(
    config: Config, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(config.run_dir.rpartition("/")[0])._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    run = json.loads(
        (checkpoint_path(Path(url.removeprefix("file://")), 9) / "run.json").read_text()
    )
    size = sum(of["bytes"] for of in run["files"].values())
    with pytest.raises(CheckpointError, match=f"has {size:,} bytes and 1,000 are free"):
        copied(config)
    assert names(config.run_dir) == []
