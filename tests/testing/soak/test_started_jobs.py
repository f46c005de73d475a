"""Every process of a job is found, whatever became of its parent, and none is left."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from processes import wait_until

from megapoly.testing.soak.started_jobs import Jobs, kill

# Starts a process in a session of its own, prints its id, and ends.
ORPHAN = (
    "import subprocess; print(subprocess.Popen(['sleep', '1000'], start_new_session=True, "
    "stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).pid)"
)


def test_orphans_are_found_and_ended(tmp_path: Path) -> None:
    with Jobs(tmp_path / "pids", num_processes=1, new_processes=True) as jobs:
        assert jobs.processes() == {}
        command = [sys.executable, "-c", ORPHAN]
        output = subprocess.run(command, env=jobs._environment, capture_output=True, check=True)
        pid = int(output.stdout)
        assert jobs.processes() == {pid: "sleep 1000"}
    wait_until(lambda: not is_alive(pid))


def is_alive(pid: int) -> bool:
    try:
        return "(sleep) Z" not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


def test_signals_to_ended_processes() -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()
        kill([process.pid], signal.SIGKILL)
