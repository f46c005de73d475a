"""Processes that end with the one that started them."""

import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import signal
import subprocess
import sys
import threading
import traceback

import pytest

from megapoly.platform.processes import die_with_parent, dying_with_this_process

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")


def alive_while_open(end):
    """Say that this process has begun, and wait; the pipe closes when it ends."""
    os.write(end, b"b")
    signal.pause()


def child_of_a_killed_process(start):
    """Return whether a process that another one starts ends when that one is killed.

    Args:
        start: called in the other process with the end of a pipe for the process that it starts.
    """
    receiver, sender = os.pipe()
    parent = os.fork()
    if parent == 0:
        try:
            os.close(receiver)
            start(sender)
            signal.pause()
        finally:  # never back into the tests
            traceback.print_exc()
            os._exit(1)
    os.close(sender)
    assert os.read(receiver, 1) == b"b"
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    with os.fdopen(receiver, "rb") as stream:
        return stream.read() == b""  # waits until the process that was started has ended


def fork(sender):
    parent = os.getpid()
    if os.fork() == 0:
        die_with_parent(parent)
        alive_while_open(sender)


def execute(sender):
    program = f"import os, signal; os.write({sender}, b'b'); signal.pause()"
    subprocess.Popen(
        [sys.executable, "-S", "-c", program],
        pass_fds=[sender],
        preexec_fn=dying_with_this_process(),
    )


def begin(connection):
    die_with_parent()
    alive_while_open(connection.fileno())


def fork_server(sender):
    """Start a process whose parent is a fork server."""
    multiprocessing.forkserver._forkserver.__init__()  # the one of the tests is not this process's
    connection = multiprocessing.connection.Connection(os.dup(sender), readable=False)
    context = multiprocessing.get_context("forkserver")
    context.Process(target=begin, args=(connection,)).start()
    connection.close()


@pytest.mark.parametrize("start", [fork, execute, fork_server])
def test_a_process_ends_with_its_parent(start):
    assert child_of_a_killed_process(start)


def test_a_process_whose_parent_has_ended_ends_at_once():
    child = os.fork()
    if child == 0:
        try:
            die_with_parent(os.getppid() + 1)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_the_end_of_another_thread_of_the_parent_changes_nothing():
    """The kernel watches the thread that starts the process."""
    receiver, sender = os.pipe()
    thread = threading.Thread(target=lambda: None)
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            die_with_parent(parent)
            os.write(sender, b"b")
            signal.pause()
        finally:  # never back into the tests
            os._exit(1)
    assert os.read(receiver, 1) == b"b"
    thread.start()
    thread.join()
    os.kill(child, signal.SIGTERM)  # would be SIGKILL of the kernel
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    os.close(receiver)
    os.close(sender)
