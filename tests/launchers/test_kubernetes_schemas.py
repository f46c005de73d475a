"""Manifests of examples/kubernetes have the fields, types and values that a cluster checks for."""

from __future__ import annotations

from typing import Any

import pytest
from kubernetes_schemas import find_problems
from pods import KINDS, documents


@pytest.mark.parametrize("kind", KINDS)
def test_manifest_is_valid(kind: str) -> None:
    assert [problem for each in documents(kind) for problem in find_problems(each)] == []


@pytest.mark.parametrize(
    "kind, gang", [("trainjob", "coscheduling"), ("trainjob", "volcano"), ("jobset", "any")]
)
def test_lines_for_a_scheduler_with_gangs_are_valid(kind: str, gang: str) -> None:
    usual, with_gang = documents(kind), documents(kind, gang=gang)
    assert with_gang != usual
    assert [problem for each in with_gang for problem in find_problems(each)] == []
    spec = with_gang[0]["spec"]
    if kind == "trainjob":
        assert set(spec["podGroupPolicy"]) == {gang}
    jobs = spec["template"]["spec"] if kind == "trainjob" else spec
    (job,) = jobs["replicatedJobs"]
    assert "schedulerName" in job["template"]["spec"]["template"]["spec"]


POD_OF_RUNTIME = "0.spec.template.spec.replicatedJobs.0.template.spec.template.spec"
MISTAKES = {
    "misspelt, in a TrainJob": ("trainjob", "1.spec.trainer.numnodes", 8),
    "of another version": ("trainjob", "0.spec.mlPolicy.torch.numProcPerNode", "auto"),
    "as Python spells it": ("trainjob", "0.spec.template.spec.failurePolicy.max_restarts", 8),
    "misspelt, in a container": ("trainjob", f"{POD_OF_RUNTIME}.containers.0.imagee", "x"),
    "of another type": ("trainjob", "1.spec.trainer.numNodes", "8"),
    "no such value": ("trainjob", f"{POD_OF_RUNTIME}.restartPolicy", "ExitCode"),
    "no quantity": ("trainjob", f"{POD_OF_RUNTIME}.volumes.0.emptyDir.sizeLimit", "64 GB"),
    "no such pod policy": (
        "jobset",
        "0.spec.replicatedJobs.0.template.spec.podFailurePolicy.rules.0.action",
        "Fail",
    ),
    "a number for a list": ("jobset", "0.spec.failurePolicy.rules.0.onJobFailureReasons", 1),
    "misspelt, in a policy": ("pytorchjob", "0.spec.runPolicy.schedulingPolicy.minMember", 8),
    "a number for a text": ("pytorchjob", "0.spec.nprocPerNode", 8),
    "misspelt, in a replica": ("pytorchjob", "0.spec.pytorchReplicaSpecs.Worker.replica", 1),
    "misspelt, in its pod": (
        "pytorchjob",
        "0.spec.pytorchReplicaSpecs.Master.template.spec.tolerance",
        [],
    ),
}


@pytest.mark.parametrize("kind, place, value", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_found(kind: str, place: str, value: Any) -> None:
    objects: Any = documents(kind)
    *path, last = [int(part) if part.isdecimal() else part for part in place.split(".")]
    inner = objects
    for part in path:
        inner = inner[part]
    inner[last] = value
    problems = [problem for each in objects for problem in find_problems(each)]
    shared = ".Master.template." in place  # by the worker's pods, an alias in the file
    assert len(problems) == (2 if shared else 1), problems
    assert problems[0].startswith(place[2:]), problems
