"""Triton's interpreter runs the kernels where there is no GPU; processes end with their test."""

import os
import signal
from collections import Counter
from collections.abc import Collection, Iterator

import processes
import pytest
import torch

# Triton looks at it when it is imported, and Megatron-Core imports it: before any test module.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# A shell starts background jobs with it ignored, which all their children would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

processes.follow_processes()


@pytest.hookimpl(trylast=True)  # after tests are deselected
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order files by their number of tests, the smallest first.

    Files of few tests start the longest jobs: last, one process would run them alone.
    """
    sizes = Counter(item.path for item in items)
    items.sort(key=lambda item: sizes[item.path])


_BEFORE = pytest.StashKey[Collection[int]]()
# Programs that a test calls here change them for good.
_HANDLERS = {
    number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    item.stash[_BEFORE] = processes.children()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    """Kill what a test or its fixtures leave running: the next test must not pay for it."""
    try:
        return (yield)
    finally:
        for number, handler in _HANDLERS.items():
            signal.signal(number, handler)
        running = processes.end_new_children(item.stash[_BEFORE])
        assert not running, f"still running at the end of the test: {running}"
