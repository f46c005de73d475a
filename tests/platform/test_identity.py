"""A process is known again, and its number alone does not do."""

import os
import subprocess
import sys
from dataclasses import replace

from processes import wait_until

from megapoly.platform import identity
from megapoly.platform.identity import _stat, is_gone, own_identity

ASLEEP = [sys.executable, "-c", "import sys; sys.stdin.read()"]


def identity_of(pid):
    return replace(own_identity(), pid=pid, start_ticks=_stat(pid)[1])


def test_this_process_is_there():
    mine = own_identity()
    assert mine.pid == os.getpid() and mine.pid_namespace.startswith("pid:[")
    assert is_gone(mine) is False


def test_a_killed_process_is_gone_collected_or_not():
    process = subprocess.Popen(ASLEEP, stdin=subprocess.PIPE)
    killed = identity_of(process.pid)
    assert is_gone(killed) is False
    process.kill()
    wait_until(lambda: _stat(process.pid)[0] == "Z")
    assert is_gone(killed) is True
    process.communicate()
    assert is_gone(killed) is True


def test_another_process_of_the_same_number_is_not_it():
    mine = own_identity()
    assert is_gone(replace(mine, start_ticks=mine.start_ticks - 1)) is True


def test_processes_of_other_machines_and_containers_cannot_be_judged():
    mine = own_identity()
    nobody = replace(mine, pid=2**22 + 1)
    assert is_gone(nobody) is True
    assert is_gone(replace(nobody, boot_id="another")) is None
    assert is_gone(replace(nobody, pid_namespace="pid:[1]")) is None


def test_a_process_that_proc_hides_is_not_gone(monkeypatch):
    process = subprocess.Popen(ASLEEP, stdin=subprocess.PIPE)
    hidden = identity_of(process.pid)
    visible = _stat
    # As for another user where /proc is mounted with hidepid.
    monkeypatch.setattr(identity, "_stat", lambda pid: None if pid == hidden.pid else visible(pid))
    assert is_gone(hidden) is None
    process.communicate()
    assert is_gone(hidden) is True
    assert is_gone(replace(hidden, pid=2**40)) is True
