"""Workers end with their pool, whatever has become of their signals."""

import signal
import sys

import pytest

from megapoly.data.preprocess import pool


def deaf(connection, *_):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    connection.send("ready")
    connection.recv()


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_worker_that_no_request_reaches_ends_with_the_pool(monkeypatch):
    monkeypatch.setattr(pool, "_serve", deaf)
    monkeypatch.setattr(pool, "_start_method", lambda: "fork")
    with pool.WorkerPool(None, 2, None, None) as workers:
        assert [each.recv() for each in workers._connections] == ["ready"] * 2
    assert [each.exitcode for each in workers._processes] == [-signal.SIGKILL] * 2
