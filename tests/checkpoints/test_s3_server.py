"""Checkpoints go to a local server of S3 and back."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_checkpoints import make_checkpoint

from megapoly.checkpoints.object_store import download, upload
from megapoly.checkpoints.run_folder import checkpoint_path
from megapoly.errors import CheckpointError

pytestmark = pytest.mark.slow  # imports the clients of all of Amazon's services


def test_a_checkpoint_goes_to_s3_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    s3fs, moto = pytest.importorskip("s3fs"), pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "test")
        s3fs.S3FileSystem().mkdir("bucket")
        checkpoint = make_checkpoint(checkpoint_path(tmp_path / "run", 6))
        url = upload(checkpoint, "s3://bucket/deep/run")
        assert url == "s3://bucket/deep/run/checkpoints/iter_0000006"
        again = download("s3://bucket/deep/run", tmp_path / "again")
        for path in checkpoint.rglob("*"):
            if path.is_file():
                copied = again / path.relative_to(checkpoint)
                assert copied.read_bytes() == path.read_bytes(), path
        with pytest.raises(CheckpointError, match="nobucket cannot be seen"):
            upload(checkpoint, "s3://nobucket/run")
    finally:
        server.stop()
