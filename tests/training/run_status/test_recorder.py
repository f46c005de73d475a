"""Targets that fail or hang: said once, and never waited for by the run."""

import threading
import time

from processes import wait_until

from megapoly.training.run_status.record import RunStatus
from megapoly.training.run_status.recorder import StatusRecorder
from megapoly.training.run_status.target import StatusFile


class Fake:
    """A place that fails when it is told to, and keeps what it took."""

    name, period_s, missing = "the place", 0.01, ""

    def __init__(self, works=True):
        self.taken, self.works, self.num_calls = [], works, 0

    def publish(self, status):
        self.num_calls += 1
        if not self.works:
            raise OSError(5, "Input/output error")
        self.taken.append(status)

    close = publish


def recorder_of(*targets):
    lines = []
    recorder = StatusRecorder(RunStatus("runs/a"), targets)
    recorder.show = lines.append
    return recorder, lines


def test_the_last_status_is_published():
    target = Fake()
    recorder, _ = recorder_of(target)
    recorder.change(step=7)
    recorder.close("stopped", message="why")
    last = target.taken[-1]
    assert (last.state, last.step, last.message, last.expected_by) == ("stopped", 7, "why", None)
    assert last.memory_bytes > 1 << 20


def test_a_row_of_failures_is_one_warning_and_its_end_one_line():
    target = Fake()
    recorder, lines = recorder_of(target)
    wait_until(lambda: target.taken)
    target.works = False
    before = target.num_calls
    wait_until(lambda: target.num_calls > before + 3)
    target.works = True
    wait_until(lambda: len(lines) >= 2)
    recorder.close("complete")
    assert lines == [
        "warning: the place cannot be written: Input/output error. Training goes on; it is tried "
        "again",
        "the place is written again",
    ]


def test_a_place_that_does_not_respond_delays_neither_the_run_nor_others():
    is_free = threading.Event()
    stuck, other = Fake(), Fake()
    stuck.publish = lambda status: is_free.wait()
    recorder, _ = recorder_of(stuck, other)
    recorder.change(step=3)  # does not wait for it
    wait_until(lambda: other.taken and other.taken[-1].step == 3)
    is_free.set()
    recorder.close("complete")
    assert other.taken[-1].state == "complete"


def test_the_file_is_written_only_when_there_is_news(tmp_path):
    file = StatusFile(tmp_path)
    path = tmp_path / "status.json"

    def is_written(**values):
        path.unlink(missing_ok=True)
        file.publish(RunStatus("a", **values))
        return path.exists()

    first = dict(step=1, expected_by=100.0)
    assert is_written(**first)
    assert not is_written(**first, updated=time.time(), memory_bytes=5)
    assert not is_written(step=1, expected_by=104.0)
    assert is_written(step=1, expected_by=105.0)
    assert is_written(step=2, expected_by=105.0)
    assert is_written(step=2, expected_by=105.0, validation={"books": 1.0})
    assert is_written(step=2, expected_by=None, validation={"books": 1.0})
