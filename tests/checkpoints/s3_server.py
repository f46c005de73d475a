"""A local server of S3 with an empty bucket, `s3://bucket`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def s3_server() -> Iterator[Any]:
    """Yield the server's file system; the environment names the server, also to processes."""
    s3fs, moto = pytest.importorskip("s3fs"), pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
            for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
                patch.setenv(name, "test")
            s3fs.S3FileSystem.clear_instance_cache()
            store = s3fs.S3FileSystem()
            store.mkdir("bucket")
            yield store
            s3fs.S3FileSystem(skip_instance_cache=True, key="test", secret="test").rm(
                "bucket",
                recursive=True,  # servers of a process have the same buckets
            )
    finally:
        server.stop()
