"""Checkpoints of a run are copied to a store while it trains."""

import pytest
import tiny_jobs

from megapoly.checkpoints.object_store import download
from megapoly.checkpoints.verify import verify
from megapoly.testing import run_job

TINY = tiny_jobs.TINY | {
    "training.train_iters": 4,
    "optimizer.lr_decay_iters": 10,
    "checkpoint.save_interval": 2,
}


def test_a_run_goes_on_from_a_store_on_another_disk(tmp_path):
    url = f"file://{tmp_path}/store/run"
    whole = run_job("dense_tiny", tmp_path / "first", TINY | {"checkpoint.upload": url})
    again = download(url, tmp_path / "second")
    assert again.name == "iter_0000004" and not verify(again).damages
    lines = run_job("dense_tiny", tmp_path / "second", TINY | {"training.train_iters": 5})
    assert [line["iteration"] for line in lines] == [5] and len(whole) == 4


def test_the_last_checkpoint_that_is_not_copied_ends_the_run_with_an_error(tmp_path):
    (tmp_path / "store").write_text("a file where a folder is needed")
    options = TINY | {"checkpoint.upload": f"file://{tmp_path}/store/run"}
    with pytest.raises(RuntimeError, match="iter_0000004 was not copied to file://"):
        run_job("dense_tiny", tmp_path / "run", options)
    saved = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert saved == ["iter_0000002", "iter_0000004"]
