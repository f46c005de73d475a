"""A job whose output nobody takes goes on, and its log says what is missing."""

import os
import re
import subprocess
import sys

# The second line does not fit; the third comes when there is room again.
FULL_DISK = """
import resource, sys
from megapoly.platform.output import train_on_without_output
print("before")
train_on_without_output()
resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
print("x" * 200, flush=True)
print("y" * 200, flush=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print("after")
"""
NO_READER = """
import logging, sys
from rich.console import Console
from megapoly.platform.output import train_on_without_output
logging.basicConfig()
train_on_without_output()
Console().print("a line")
print("another", file=sys.stderr)
logging.warning("a third")
"""


def run(program, **streams):
    return subprocess.run([sys.executable, "-c", program], **streams).returncode


def test_a_log_on_a_full_disk_says_how_many_bytes_are_missing(tmp_path):
    log = tmp_path / "log"
    with log.open("w") as file:
        assert run(FULL_DISK, stdout=file) == 0
    found = re.fullmatch(
        r"before\n(x+)\n\((\d+) bytes are missing here: File too large\)\nafter\n", log.read_text()
    )
    assert found is not None
    assert len(found[1]) + int(found[2]) == 201 + 201
    assert len("before\n") + len(found[1]) == 100


def test_a_reader_that_has_ended_does_not_end_the_job(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    assert run(NO_READER, stdout=writer, stderr=writer) == 0
    os.close(writer)
