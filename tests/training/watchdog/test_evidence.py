"""What is found out about a process, of real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from processes import wait_until

from megapoly.training.watchdog import evidence

PROGRAM = f"""
import faulthandler, os, sys, threading
stacks = int(sys.argv[1])
if stacks >= 0:
    faulthandler.register({int(evidence.STACK_SIGNAL)}, file=stacks, all_threads=True)
threading.Thread(target=threading.Event().wait, daemon=True).start()
def wait_for_ever():
    print("ready", flush=True)
    os.read(0, 1)
wait_for_ever()
"""


def start(file: int) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", PROGRAM, str(file)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        pass_fds=[file] if file >= 0 else [],
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def end(process: subprocess.Popen[str]) -> int:
    process.kill()
    process.communicate()
    return process.returncode


def test_stacks_of_all_threads_and_the_frames_of_the_main_one() -> None:
    file = os.memfd_create("stacks")
    process = start(file)
    for _ in range(2):  # the second time the file has stacks already
        text = evidence.stacks(process.pid, file)
        assert text.count("most recent call first") == 2
        assert [frame[2] for frame in evidence.main_thread(text)] == ["wait_for_ever", "<module>"]
    assert evidence.main_thread("") == []
    assert end(process) == -signal.SIGKILL
    assert evidence.stacks(process.pid, file) == ""
    os.close(file)


def test_a_process_that_does_not_handle_the_signal_is_not_sent_it() -> None:
    process = start(-1)
    assert evidence.stacks(process.pid, 0) == ""
    assert process.poll() is None
    end(process)


def test_a_stopped_process_and_whose_child_it_is() -> None:
    process = start(-1)
    process.send_signal(signal.SIGSTOP)
    wait_until(lambda: evidence.process(process.pid).state == evidence.STOPPED)
    assert evidence.stacks(process.pid, 0) == ""
    assert process.pid in [each.pid for each in evidence.descendants(os.getpid())]
    end(process)
    assert evidence.process(process.pid) is None


def test_bytes_that_a_process_and_its_children_move(tmp_path) -> None:
    before = evidence.bytes_moved(os.getpid())
    (tmp_path / "file").write_bytes(bytes(1 << 20))
    assert evidence.bytes_moved(os.getpid()) - before >= 1 << 20


def entry(number: int, operation: str, **changes: object) -> dict[str, object]:
    values = {"process_group": ["1", "TP"], "collective_seq_id": number, "is_p2p": False}
    return values | {"profiling_name": operation, "state": "scheduled", "retired": True} | changes


def test_where_a_rank_is_in_its_groups() -> None:
    members = {"1": [0, 1]}
    done, begun = entry(4, "gloo:all_reduce"), entry(5, "gloo:all_reduce", retired=False)
    groups = evidence.groups_of({"entries": [done]}, members)
    assert groups == {"1": evidence.Group([0, 1], "TP", 4, "")}
    groups = evidence.groups_of({"entries": [done, begun]}, members)
    assert groups == {"1": evidence.Group([0, 1], "TP", 5, "all_reduce #5")}
    # NCCL: what is queued behind a kernel that hangs has not begun.
    done = entry(4, "nccl:all_reduce", state="completed")
    queued = entry(5, "nccl:all_reduce", retired=False)
    groups = evidence.groups_of({"entries": [done, queued]}, members)
    assert groups == {"1": evidence.Group([0, 1], "TP", 4, "all_reduce #5")}
    send = entry(5, "nccl:send 0->1", retired=False, is_p2p=True, state="started")
    groups = evidence.groups_of({"entries": [send]}, members)
    assert groups == {"1": evidence.Group([0, 1], "TP", 0, "send 0->1")}
    assert evidence.groups_of({"entries": [begun]}, {}) == {}
    assert evidence.groups_of({}, members) == {}
