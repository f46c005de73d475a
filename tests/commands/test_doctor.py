"""The command on this machine."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

DOCTOR = Path(__file__).parents[2] / "tools" / "doctor.py"


def run(*words: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(DOCTOR), *words],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return run("--json", folder=tmp_path_factory.mktemp("elsewhere"))


def test_this_machine_in_json(report):
    found = json.loads(report.stdout)
    lines = {line["part"]: line for line in found["lines"]}
    wrong = [line for line in found["lines"] if line["status"] == "wrong"]
    assert found["usable"] == (wrong == []) == (report.returncode == 0)
    assert all(line["remedy"] for line in wrong)
    assert lines["torch"]["found"] == torch.__version__
    assert lines["megatron-core"]["found"] == importlib.metadata.version("megatron-core")
    assert found["facts"]["torch"]["sees_cuda"] == torch.cuda.is_available()
    assert found["missing_by_command"]["train"] == found["missing_by_command"]["doctor"] == {}
    assert found["facts"]["system"]["cores"] == len(os.sched_getaffinity(0))


def test_a_package_that_breaks_on_opening_is_found(tmp_path):
    """A triton in front of the real one that ends the process that imports it."""
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("import os\nos.abort()\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    result = run(folder=tmp_path, PYTHONPATH=path)
    # Torch and the engine also import triton.
    assert result.returncode == 1
    assert "the process ended with -6" in result.stdout
    assert "megatron-core: pip install" in result.stdout
    assert "Training cannot run here as it is." in result.stdout


def test_wrong_options_end_with_2(tmp_path):
    assert run("--yaml", folder=tmp_path).returncode == 2


def test_the_status_is_the_same_for_a_reader_that_has_seen_enough(report):
    command = [sys.executable, str(DOCTOR)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == report.returncode
