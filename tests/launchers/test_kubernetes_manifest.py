"""examples/kubernetes: sizes that fit the recipe, statuses, and commands run as two pods."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest
from commands import ROOT, TINY, Programs, steps
from pods import KINDS, Job, documents, load
from processes import num_lines, wait_until

from megapoly.commands.status import build_parser
from megapoly.config import load_recipe
from megapoly.config.rules import find_problems
from megapoly.platform.launcher import (
    DIVERGED,
    HUNG,
    LOST_PEER,
    means_restart,
    scheduler_job,
)
from megapoly.platform.machine import Machine
from megapoly.testing.jobs import shared_cache

A100 = Machine(cuda=True, compute_capability=(8, 0), transformer_engine=True)
# Status of `megapoly launch` for an error, and for a configuration that cannot be used.
ERROR, UNUSABLE = 1, 2


@pytest.fixture(params=KINDS)
def job(request: pytest.FixtureRequest) -> Job:
    return load(request.param)


def problems_of_recipe(name: str, num_gpus: int) -> list[str]:
    problems = find_problems(load_recipe(name), world_size=num_gpus, machine=A100)
    return [problem for problem in problems if "`data." not in problem]


def test_one_process_for_each_gpu_and_a_layout_that_fits(job: Job) -> None:
    assert job.num_processes == job.num_gpus == 8
    assert job.num_nodes * job.num_gpus == 64
    (config,) = [word for word in job.command if word.startswith("--config=")]
    assert problems_of_recipe(config.removeprefix("--config="), 64) == []
    # And the change that each head describes: 4 nodes.
    assert problems_of_recipe("dense_1b_paper", 4 * job.num_gpus) == []


def test_pods_are_as_the_images_need_them(job: Job) -> None:
    pod, container = job.pod, job.container
    dockerfile = (ROOT / "docker/Dockerfile").read_text()
    assert f"ARG UID={pod['securityContext']['runAsUser']}\n" in dockerfile
    assert f"ARG GID={pod['securityContext']['fsGroup']}\n" in dockerfile
    assert pod["terminationGracePeriodSeconds"] >= 600 and pod["shareProcessNamespace"]
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in pod[
        "tolerations"
    ]
    assert container["securityContext"]["capabilities"]["add"] == ["IPC_LOCK"]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert set(mounts) == {"/dev/shm", "/opt/megapoly/data", "/opt/megapoly/runs"}
    read_only = {each["mountPath"] for each in container["volumeMounts"] if each.get("readOnly")}
    assert read_only == {"/opt/megapoly/data"}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    assert set(mounts.values()) == set(volumes)


@pytest.mark.parametrize("kind", KINDS)
def test_names_that_controllers_look_for(kind: str) -> None:
    objects = documents(kind)
    queued = objects[-1]
    assert queued["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "training"}
    assert "suspend" not in queued["spec"], "Kueue sets it"
    name = load(kind).container["name"]
    if kind == "pytorchjob":
        assert name == "pytorch"
        assert [each["name"] for each in load(kind).container["ports"]] == ["pytorchjob-port"]
        return
    assert name == "node"
    fields = {
        each["name"]: each["valueFrom"]["fieldRef"]["fieldPath"]
        for each in load(kind).container["env"]
        if "valueFrom" in each
    }
    assert fields["POD_NAME"] == "metadata.name"
    # The JobSet of a TrainJob is made again when it is deleted: a message must not name it.
    assert ("JOBSET_NAME" in fields) == (kind == "jobset")
    assert fields["JOBSET_UID"] == "metadata.labels['jobset.sigs.k8s.io/jobset-uid']"
    if kind == "trainjob":
        runtime, train_job = objects
        reference = train_job["spec"]["runtimeRef"]
        assert reference == {"kind": runtime["kind"], "name": runtime["metadata"]["name"]}
        (replicated,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
        labels = replicated["template"]["metadata"]["labels"]
        assert labels == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
        assert runtime["spec"]["mlPolicy"] == {"numNodes": train_job["spec"]["trainer"]["numNodes"],
                                               "torch": {}}  # fmt: skip
    else:
        (replicated,) = queued["spec"]["replicatedJobs"]
        address = (
            f"{queued['metadata']['name']}-{replicated['name']}-0-0.{queued['metadata']['name']}"
        )
        assert {"name": "PET_MASTER_ADDR", "value": address} in load(kind).container["env"]


def test_starts_are_counted_for_one_object_of_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JOBSET_NAME", "megapoly")
    monkeypatch.setenv("JOBSET_UID", "6f1c")
    assert scheduler_job() == "6f1c"


def test_probes_ask_about_the_run_and_begin_when_it_can_have_started(job: Job) -> None:
    (run_dir,) = [word for word in job.command if word.startswith("--run_dir=")]
    startup, liveness = job.container["startupProbe"], job.container["livenessProbe"]
    for probe in (startup, liveness):
        asked = ["megapoly", "status", run_dir.removeprefix("--run_dir="), "--check"]
        assert probe["exec"]["command"] == asked
        options = build_parser().parse_args(asked[2:])
        assert options.check and options.folders == [Path(asked[2])]
        assert 20 <= probe["timeoutSeconds"] <= probe["periodSeconds"]
    time_to_start_s = startup["periodSeconds"] * startup["failureThreshold"]
    assert liveness["initialDelaySeconds"] >= time_to_start_s >= 1800
    variables = job.variables(0, 1, 1)
    # Pods that wait for one that has no node are to start again, not to end with UNUSABLE.
    assert int(variables["MEGAPOLY_JOIN_TIMEOUT_S"]) > time_to_start_s + startup["timeoutSeconds"]


def decision(kind: str, status: int, *, disrupted: bool = False) -> str:
    """What follows when a pod ends, as the controllers of Job (1.31) and JobSet (0.12) decide."""
    objects = documents(kind)
    jobset = objects[0]["spec"] if kind == "jobset" else objects[0]["spec"]["template"]["spec"]
    (replicated,) = jobset["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert job["template"]["spec"]["restartPolicy"] == "Never" and job["backoffLimit"] == 0
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for index, rule in enumerate(job["podFailurePolicy"]["rules"]):
        codes = rule.get("onExitCodes", {"values": []})
        assert sorted(codes["values"]) == codes["values"], "the API wants them in order"
        end = f"matching {rule['action']} rule at index {index}"
        if disrupted and {"type": "DisruptionTarget", "status": "True"} in rule.get(
            "onPodConditions", []
        ):
            reason, message = "PodFailurePolicy", f"Pod a/b has condition DisruptionTarget {end}"
            break
        if status in codes["values"]:
            reason = "PodFailurePolicy"
            message = f"Container node for pod a/b failed with exit code {status} {end}"
            break
    for rule in jobset["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule["onJobFailureReasons"] and any(re.search(p, message) for p in patterns):
            return rule["action"]
    return "RestartJobSet"


@pytest.mark.parametrize("kind", ["trainjob", "jobset"])
def test_a_set_of_pods_starts_again_or_ends_by_the_status(kind: str) -> None:
    for status in (ERROR, UNUSABLE, DIVERGED, 126, 127):
        assert decision(kind, status) == "FailJobSet", status
    for status in (HUNG, LOST_PEER, 128 + 9, 128 + 11):
        assert means_restart(status) and decision(kind, status) == "RestartJobSet", status
    assert not any(map(means_restart, (ERROR, UNUSABLE, DIVERGED)))
    stopped = int(load(kind).variables(0, 1, 1)["MEGAPOLY_STOPPED_STATUS"])
    assert decision(kind, stopped) == "RestartJobSetAndIgnoreMaxRestarts"
    # An evicted pod may end in any way.
    for status in (ERROR, UNUSABLE, stopped, 128 + 9):
        assert decision(kind, status, disrupted=True) == "RestartJobSetAndIgnoreMaxRestarts"


def test_a_pod_of_the_operator_starts_again_by_its_status() -> None:
    variables = load("pytorchjob").variables(0, 1, 1)
    for name in ("MEGAPOLY_STOPPED_STATUS", "MEGAPOLY_RESTART_STATUS"):
        assert 128 <= int(variables[name]) <= 255, "the operator starts a pod again at these"
    # What the operator takes as final without that variable.
    assert all(status < 128 for status in (ERROR, UNUSABLE, DIVERGED, HUNG, LOST_PEER))


def test_a_pod_that_waits_for_another_is_stopped_at_once(programs: Programs) -> None:
    """As the start-up probe does it; for the manifest it was stopped."""
    job = load("trainjob")
    variables = job.variables(1, num_nodes=2, num_processes=1)
    variables |= {"PET_MASTER_PORT": str(random.randrange(20000, 30000))}
    pod = programs.start(["bash", "-c", 'echo begun; exec "$@"', "-", *job.command], variables)
    assert pod.stdout is not None and pod.stdout.readline() == "begun\n"
    pod.terminate()
    pod.communicate()
    # As a container's status has it.
    assert 128 - pod.returncode == int(variables["MEGAPOLY_STOPPED_STATUS"])


@pytest.mark.parametrize(
    "kind",
    [
        "trainjob",
        *[pytest.param(each, marks=pytest.mark.slow) for each in ("jobset", "pytorchjob")],
    ],
)
def test_its_command_runs_on_two_pods_and_says_that_it_was_stopped(
    kind: str, tmp_path: Path, programs: Programs
) -> None:
    job = load(kind)
    port = str(random.randrange(20000, 30000))  # none that the kernel gives to connections
    run_dir = tmp_path / "run"
    recipe = "--config=examples/configs/moe_tiny.yaml"
    command = [recipe if word.startswith("--config=") else word for word in job.command]
    overrides = [*TINY, "--run_dir", str(run_dir)]
    overrides += ["--training.train_iters", "400", "--data.cache_dir", shared_cache().name]
    pods = []
    for rank in range(2):
        variables: dict[str, Any] = job.variables(rank, num_nodes=2, num_processes=1)
        variables |= {"PET_MASTER_PORT": port, "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        pods.append(programs.start([*command, *overrides], variables))
    wait_until(lambda: num_lines(run_dir / "metrics.jsonl") >= 2, *pods)
    for pod in pods:
        pod.terminate()
    outputs = [pod.communicate()[0] for pod in pods]
    assert [pod.returncode for pod in pods] == [143, 143], outputs
    assert "2 x CPU" in outputs[0] and "stop requested: ending after step" in outputs[0]
    (checkpoint,) = (run_dir / "checkpoints").iterdir()
    assert checkpoint.name == f"iter_{steps(run_dir)[-1]:07d}"
