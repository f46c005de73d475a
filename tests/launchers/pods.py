"""The jobs of examples/kubernetes: what each manifest asks for, and what its controller adds."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import yaml
from commands import ROOT

KINDS = {"trainjob": "trainjob.yaml", "jobset": "jobset.yaml", "pytorchjob": "pretrain.yaml"}


@dataclass
class Job:
    """A job of pods that are alike.

    Args:
        pod: specification of its pods.
        num_nodes: pods, one on each node.
        num_processes: processes of each pod.
        command: of the container that trains.
        added: returns what the controller adds to the variables of a pod, by its node's rank and
            the numbers of nodes and of processes on each.
    """

    pod: dict[str, Any]
    num_nodes: int
    num_processes: int
    num_gpus: int
    command: list[str]
    added: Callable[[int, int, int], dict[str, str]]

    @property
    def container(self) -> dict[str, Any]:
        (only,) = self.pod["containers"]
        return only

    def variables(self, rank: int, num_nodes: int, num_processes: int) -> dict[str, str]:
        """Return the variables of the pod on node ``rank``, for any size of the job."""
        own = {each["name"]: each["value"] for each in self.container["env"] if "value" in each}
        return own | self.added(rank, num_nodes, num_processes)


def text(kind: str) -> str:
    """Return the text of a kind's manifest."""
    return (ROOT / "examples/kubernetes" / KINDS[kind]).read_text()


def documents(kind: str, *, gang: str = "") -> list[dict[str, Any]]:
    """Return the objects of a kind's manifest.

    Args:
        kind: of the job.
        gang: scheduler with gangs, whose lines, which are comments, take effect.
    """
    source = text(kind)
    if gang:
        source = re.sub(rf"# (podGroupPolicy: {{{gang}.*)", r"\1", source)
        source = re.sub(r"# (schedulerName:|metadata: {labels: {scheduling)", r"\1", source)
    return list(yaml.safe_load_all(source))


def load(kind: str) -> Job:
    """Return the job of a kind's manifest."""
    return {"trainjob": _trainjob, "jobset": _jobset, "pytorchjob": _pytorchjob}[kind]()


def torchrun_variables(rank: int, num_nodes: int, num_processes: int) -> dict[str, str]:
    """Return what every controller adds, each in its way, for nodes that are this machine."""
    return {
        "PET_NODE_RANK": str(rank),
        "PET_NNODES": str(num_nodes),
        "PET_NPROC_PER_NODE": str(num_processes),
        "PET_MASTER_ADDR": "localhost",
    }


def _trainjob() -> Job:
    """Trainer 2.3, pkg/runtime/framework/plugins/torch and jobset."""
    runtime, job = documents("trainjob")
    trainer = job["spec"]["trainer"]
    (replicated,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    pod = replicated["template"]["spec"]["template"]["spec"]
    return Job(
        pod=pod,
        num_nodes=trainer["numNodes"],
        num_processes=trainer["numProcPerNode"],
        num_gpus=trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"],
        command=pod["containers"][0]["command"],
        added=torchrun_variables,
    )


def _jobset() -> Job:
    """JobSet alone adds nothing: the manifest has all, the rank by reference to an annotation."""
    (jobset,) = documents("jobset")
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    container = pod["containers"][0]
    given = {each["name"]: each for each in container["env"]}
    names = set(torchrun_variables(0, 1, 1))
    assert names <= set(given)
    assert "completion-index" in given["PET_NODE_RANK"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert int(given["PET_NNODES"]["value"]) == job["parallelism"] == job["completions"]
    return Job(
        pod=pod,
        num_nodes=job["parallelism"],
        num_processes=int(given["PET_NPROC_PER_NODE"]["value"]),
        num_gpus=container["resources"]["limits"]["nvidia.com/gpu"],
        command=container["command"],
        added=torchrun_variables,
    )


def _pytorchjob() -> Job:
    """The training operator 1.9, pkg/controller.v1/pytorch."""
    (job,) = documents("pytorchjob")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert set(replicas) == {"Master", "Worker"} and "elasticPolicy" not in job["spec"]
    master, worker = replicas["Master"], replicas["Worker"]
    assert master["template"] == worker["template"]
    assert master["restartPolicy"] == worker["restartPolicy"] == "ExitCode"
    pod = master["template"]["spec"]
    container = pod["containers"][0]

    def added(rank: int, num_nodes: int, num_processes: int) -> dict[str, str]:
        of_torchrun = torchrun_variables(rank, num_nodes, num_processes)
        size = {"RANK": str(rank), "WORLD_SIZE": str(num_nodes * num_processes)}
        return of_torchrun | size | {"PYTHONUNBUFFERED": "1", "MASTER_ADDR": "localhost"}

    return Job(
        pod=pod,
        num_nodes=master["replicas"] + worker["replicas"],
        num_processes=int(job["spec"]["nprocPerNode"]),
        num_gpus=container["resources"]["limits"]["nvidia.com/gpu"],
        command=container["command"],
        added=added,
    )
