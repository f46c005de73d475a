"""megapoly-launch gives workers time to save, with any version of torch."""

from __future__ import annotations

import sys
from pathlib import Path

from commands import Programs
from processes import wait_until

# torchrun as in torch 2.10, which does not read the variable. Its 30 seconds are one here.
OLD_TORCHRUN = """
import signal, sys
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import PContext

def shutdown(self, death_sig=signal.SIGTERM, timeout=None):
    if self._pcontext:
        self._pcontext.close(death_sig)

LocalElasticAgent._shutdown = shutdown
PContext.close.__defaults__ = (None, 1)
from megapoly.commands.launch import main
sys.exit(main())
"""
# One whose checkpoint takes 2.5 seconds.
WORKER = """
import os, pathlib, signal, sys, time

def save(*signal_and_frame):
    time.sleep(2.5)
    pathlib.Path(os.environ["MEGAPOLY_STATUS_FILE"]).write_text("stopped")
    sys.exit(0)

signal.signal(signal.SIGTERM, save)
pathlib.Path(sys.argv[1]).touch()
signal.pause()
"""


def test_workers_have_time_to_save_by_an_older_torchrun(tmp_path: Path, programs: Programs) -> None:
    (tmp_path / "old.py").write_text(OLD_TORCHRUN)
    (tmp_path / "worker.py").write_text(WORKER)
    began = tmp_path / "began"
    args = [sys.executable, str(tmp_path / "old.py"), "--standalone", "--nproc-per-node", "1"]
    (tmp_path / "tmp").mkdir()
    variables = {"MEGAPOLY_STOPPED_STATUS": "75", "OMP_NUM_THREADS": "1"}
    variables["TMPDIR"] = str(tmp_path / "tmp")
    process = programs.start([*args, str(tmp_path / "worker.py"), str(began)], variables)
    wait_until(began.exists, process)
    process.terminate()
    output, _ = process.communicate()
    assert process.returncode == 75, output
    assert list((tmp_path / "tmp").iterdir()) == []
