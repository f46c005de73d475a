from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hosts import ROOT
from slurm_cluster import Cluster, slurm_cluster

# For megapoly-launch, where only its arguments and its end matter. STATUS_0 and STATUS_1 are its
# statuses on the nodes; `wait`: 75 when it gets TERM, as a run that has saved.
_LAUNCHER = """#!/bin/bash
echo "called: $*"
name=STATUS_$2
case ${!name:-0} in
wait) trap 'exit 75' TERM; echo ready; while :; do sleep 0.1; done ;;
killed) kill -9 $$ ;;
*) exit ${!name:-0} ;;
esac
"""


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture
def slurm(cluster: Cluster) -> Iterator[Cluster]:
    """Give a cluster without jobs."""
    yield cluster
    cluster.cancel_all()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Give a checkout whose launcher prints how it is called and ends at once."""
    folder = tmp_path / "check out"
    for file in ("megapoly/commands/launch.py", "examples/pretrain_dense.sh"):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    (folder / "examples/slurm").symlink_to(ROOT / "examples/slurm")
    program = folder / ".venv/bin/megapoly-launch"
    program.parent.mkdir(parents=True)
    program.write_text(_LAUNCHER)
    program.chmod(0o755)
    return folder
