"""Token files on a local server of S3: copied whole, and what is wrong is said."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from s3_server import s3_server

from megapoly.data.stored_pairs import StoredPairs
from megapoly.errors import DataError
from megapoly.platform import stores

pytestmark = pytest.mark.slow  # imports the clients of all of Amazon's services

ENDINGS = (".bin", ".idx")


def test_pairs_come_from_s3(tmp_path: Path, prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_server() as store:
        for name in ("a_text", "b_text"):
            for ending in ENDINGS:
                store.put_file(f"{prefix}{ending}", f"bucket/deep/{name}{ending}")
        url = "s3://bucket/deep/*_text"
        pairs = StoredPairs([url], tmp_path)
        assert pairs.find() == pairs.found() == {url: [f"s3://bucket/deep/{n}_text" for n in "ab"]}
        local = pairs.fetch("s3://bucket/deep/b_text")
        for ending in ENDINGS:
            copied, original = Path(f"{local}{ending}"), Path(f"{prefix}{ending}")
            assert copied.read_bytes() == original.read_bytes()

        for absent in ("s3://bucket/no_such", "s3://nobucket/a_text"):
            with pytest.raises(DataError, match=rf"{absent}\.bin: is not in the store"):
                StoredPairs([absent], tmp_path).find()
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        type(store).clear_instance_cache()
        with pytest.raises(DataError, match="the store needs credentials"):
            StoredPairs([url], tmp_path).find()


def test_a_server_that_does_not_answer_ends_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3fs = pytest.importorskip("s3fs")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setattr(stores, "_answering", set())
    with socket.socket() as silent, socket.socket() as closed:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        closed.bind(("127.0.0.1", 0))
        for server, said in ((closed, "cannot be reached"), (silent, "does not answer within 5 s")):
            host, port = server.getsockname()
            monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
            s3fs.S3FileSystem.clear_instance_cache()
            # Longer than the client tries a port that nobody listens on.
            monkeypatch.setattr(stores, "FIRST_ANSWER_S", 5.0 if server is silent else 120.0)
            with pytest.raises(DataError, match=said):
                StoredPairs(["s3://bucket/a_text"], tmp_path).find()
