"""examples/skypilot/pretrain.yaml: sizes, statuses, and its command run as two nodes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import ROOT, TINY, Programs, steps
from processes import num_lines, wait_until

from megapoly.config import load_recipe
from megapoly.config.rules import find_problems
from megapoly.platform.machine import Machine
from megapoly.testing.jobs import shared_cache

A100 = Machine(cuda=True, compute_capability=(8, 0), transformer_engine=True)


@pytest.fixture(scope="module")
def task() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "examples/skypilot/pretrain.yaml").read_text())


def test_its_gpus_fit_the_recipe_and_it_starts_again_at_the_status_of_the_program(
    task: dict[str, Any],
) -> None:
    resources = task["resources"]
    gpus = int(resources["accelerators"].partition(":")[2])
    problems = find_problems(
        load_recipe("moe_7b_paper"), world_size=task["num_nodes"] * gpus, machine=A100
    )
    assert [problem for problem in problems if "`data." not in problem] == []
    again = int(task["envs"]["MEGAPOLY_RESTART_STATUS"])
    assert resources["job_recovery"]["recover_on_exit_codes"] == [again]
    # 137 is what SkyPilot gives to all other nodes once one has failed, with whatever status.
    assert again > 5 and again != 137
    assert f"docker:{_base_image()}" == resources["image_id"]


def _base_image() -> str:
    dockerfile = (ROOT / "docker/Dockerfile").read_text()
    (base,) = [line for line in dockerfile.splitlines() if line.startswith("ARG BASE=")]
    return base.removeprefix("ARG BASE=")


@pytest.mark.slow
def test_its_command_runs_on_two_nodes(
    task: dict[str, Any], tmp_path: Path, programs: Programs
) -> None:
    """In a folder like a checkout, with folders of this test for the volume."""
    checkout, volume = tmp_path / "checkout", tmp_path / "volume"
    (volume / "data").mkdir(parents=True)
    checkout.mkdir()
    (checkout / "examples").symlink_to(ROOT / "examples")
    port = str(random.randrange(20000, 30000))  # none that the kernel gives to connections
    run = task["run"].rstrip().replace("/megapoly/", f"{volume}/").replace("29500", port)
    run = run.replace("--config=moe_7b_paper", "--config=moe_tiny")
    options = [*TINY, "--training.train_iters", "3", "--data.cache_dir", shared_cache().name]
    variables = {**task["envs"], "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    variables |= {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "1"}
    variables |= {"SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.1"}
    nodes = []
    for rank in ("0", "1"):
        of_node = variables | {"SKYPILOT_NODE_RANK": rank}
        command = ["bash", "-c", f"{run} {' '.join(options)}"]
        nodes.append(programs.start(command, of_node, cwd=checkout))
    run_dir = volume / "runs/moe_7b_paper"
    wait_until(lambda: num_lines(run_dir / "metrics.jsonl") >= 1, *nodes)
    outputs = [node.communicate()[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert "2 x CPU" in outputs[0] and steps(run_dir)[-1] == 3
    assert (checkout / "data").resolve() == volume / "data"
