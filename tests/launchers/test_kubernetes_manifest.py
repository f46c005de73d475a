"""examples/kubernetes/pretrain.yaml: sizes that fit its recipe, and its command run as two pods."""

from __future__ import annotations

import copy
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
def manifest() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "examples/kubernetes/pretrain.yaml").read_text())


def replicas(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    return list(manifest["spec"]["pytorchReplicaSpecs"].values())


def container(replica: dict[str, Any]) -> dict[str, Any]:
    (only,) = replica["template"]["spec"]["containers"]
    return only


def operator_variables(manifest: dict[str, Any], node_rank: int, port: int) -> dict[str, str]:
    """What the training operator (1.9, pkg/controller.v1/pytorch) adds to a pod of the job.

    The master's address, its service's name in a cluster, is this machine's, and the port any.
    """
    num_nodes = sum(replica["replicas"] for replica in replicas(manifest))
    per_node = manifest["spec"]["nprocPerNode"]
    added = {"PYTHONUNBUFFERED": "1", "WORLD_SIZE": str(num_nodes * int(per_node))}
    added |= {"RANK": str(node_rank), "PET_NODE_RANK": str(node_rank)}
    added |= {"PET_NPROC_PER_NODE": per_node, "PET_NNODES": str(num_nodes)}
    for name in ("MASTER_", "PET_MASTER_"):
        added |= {name + "ADDR": "localhost", name + "PORT": str(port)}
    return added


def test_one_process_for_each_gpu_and_a_layout_that_fits(manifest: dict[str, Any]) -> None:
    num_gpus = 0
    for replica in replicas(manifest):
        gpus = container(replica)["resources"]["limits"]["nvidia.com/gpu"]
        assert manifest["spec"]["nprocPerNode"] == str(gpus)
        num_gpus += replica["replicas"] * gpus
    assert num_gpus == 64
    (config,) = [w for w in container(replicas(manifest)[0])["command"] if "--config=" in w]
    config = load_recipe(config.removeprefix("--config="))
    problems = find_problems(config, world_size=num_gpus, machine=A100)
    assert [problem for problem in problems if "`data." not in problem] == []
    # And the change that its head describes.
    dense = load_recipe("dense_1b_paper")
    problems = find_problems(dense, world_size=(1 + 3) * 8, machine=A100)
    assert [problem for problem in problems if "`data." not in problem] == []


def test_pods_are_as_the_images_and_the_operator_need_them(manifest: dict[str, Any]) -> None:
    assert (manifest["apiVersion"], manifest["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert set(manifest["spec"]["pytorchReplicaSpecs"]) == {"Master", "Worker"}
    assert "elasticPolicy" not in manifest["spec"]
    for replica in replicas(manifest):
        pod, main = replica["template"]["spec"], container(replica)
        assert main["name"] == "pytorch"
        assert [port["name"] for port in main["ports"]] == ["pytorchjob-port"]
        assert replica["restartPolicy"] == "ExitCode"
        (status,) = [e["value"] for e in main["env"] if e["name"] == "MEGAPOLY_STOPPED_STATUS"]
        assert 128 <= int(status) <= 255, "the operator starts a pod again at these"
        assert pod["terminationGracePeriodSeconds"] >= 600
        dockerfile = (ROOT / "docker/Dockerfile").read_text()
        assert f"ARG UID={pod['securityContext']['runAsUser']}\n" in dockerfile
        assert f"ARG GID={pod['securityContext']['fsGroup']}\n" in dockerfile
        mounts = {mount["mountPath"]: mount["name"] for mount in main["volumeMounts"]}
        assert set(mounts) == {"/dev/shm", "/opt/megapoly/data", "/opt/megapoly/runs"}
        read_only = {mount["mountPath"] for mount in main["volumeMounts"] if mount.get("readOnly")}
        assert read_only == {"/opt/megapoly/data"}
        assert any(word.startswith("--run_dir=runs/") for word in main["command"])
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
        assert set(mounts.values()) == set(volumes)


def test_its_command_runs_on_two_pods_and_says_that_it_was_stopped(
    manifest: dict[str, Any], tmp_path: Path, programs: Programs
) -> None:
    manifest = copy.deepcopy(manifest)
    for replica in replicas(manifest):
        replica["replicas"] = 1
    manifest["spec"]["nprocPerNode"] = "1"
    port = random.randrange(20000, 30000)  # none that the kernel gives to connections
    run_dir = tmp_path / "run"
    recipe = "--config=examples/configs/moe_tiny.yaml"
    overrides = [*TINY, "--run_dir", str(run_dir)]
    overrides += ["--training.train_iters", "400", "--data.cache_dir", shared_cache().name]
    pods = []
    for node_rank, replica in enumerate(replicas(manifest)):
        own = {entry["name"]: entry["value"] for entry in container(replica)["env"]}
        variables = own | operator_variables(manifest, node_rank, port) | {"OMP_NUM_THREADS": "1"}
        command = container(replica)["command"]
        command = [recipe if word.startswith("--config=") else word for word in command]
        pods.append(programs.start([*command, *overrides], variables))
    wait_until(lambda: num_lines(run_dir / "metrics.jsonl") >= 2, pods[0])
    for pod in pods:
        pod.terminate()
    outputs = [pod.communicate()[0] for pod in pods]
    assert [pod.returncode for pod in pods] == [143, 143], outputs
    assert "2 x CPU" in outputs[0] and "stop requested: ending after step" in outputs[0]
    (checkpoint,) = (run_dir / "checkpoints").iterdir()
    assert checkpoint.name == f"iter_{steps(run_dir)[-1]:07d}"
