"""Checkpoints go to a local server of S3 and back."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_checkpoints import make_checkpoint
from s3_server import s3_server

from megapoly.checkpoints.object_store import download, fetch, newest_in_store, upload
from megapoly.checkpoints.run_folder import checkpoint_path
from megapoly.errors import CheckpointError

pytestmark = pytest.mark.slow  # imports the clients of all of Amazon's services


def test_a_checkpoint_goes_to_s3_and_back(tmp_path: Path) -> None:
    with s3_server():
        run = "s3://bucket/deep/run"
        assert newest_in_store(run) is None
        checkpoint = make_checkpoint(checkpoint_path(tmp_path / "run", 6))
        url = upload(checkpoint, run)
        assert url == f"{run}/checkpoints/iter_0000006"
        assert newest_in_store(run) == "iter_0000006"
        for again in (download(run, tmp_path / "again"), fetch(url, tmp_path / "cache")):
            for path in checkpoint.rglob("*"):
                if path.is_file():
                    copied = again / path.relative_to(checkpoint)
                    assert copied.read_bytes() == path.read_bytes(), path
        for action in (
            lambda: upload(checkpoint, "s3://nobucket/run"),
            lambda: newest_in_store("s3://nobucket/run"),
        ):
            with pytest.raises(CheckpointError, match="nobucket cannot be seen"):
                action()
