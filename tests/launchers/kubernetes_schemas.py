"""Manifests against the types of Kubernetes, JobSet and Kubeflow: unknown fields, types, values.

Kubeflow publishes the types of its objects, which contain JobSet's and Kubernetes' own, as Python
packages made from the schemas that a cluster checks with. They ignore fields that they do not know,
as misspelt ones; the functions here do not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import kubeflow.training.models as kubeflow_v1
import kubeflow_trainer_api.models as kubeflow_v2
from pydantic import BaseModel, ValidationError

# Numbers with a unit, such as 64Gi, and ports by number or name. The packages wrap them in objects;
# https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/quantity has the grammar.
_QUANTITY = re.compile(r"[+-]?\d+(\.\d+)?([KMGTPE]i|[numkMGTPE]|[eE][+-]?\d+)?")
_SCALARS = {
    "IoK8sApimachineryPkgApiResourceQuantity": lambda value: _QUANTITY.fullmatch(str(value)),
    "IoK8sApimachineryPkgUtilIntstrIntOrString": lambda value: isinstance(value, int | str),
}
_MODELS = {
    ("trainer.kubeflow.org/v1alpha1", "TrainingRuntime"): "TrainerV1alpha1TrainingRuntime",
    ("trainer.kubeflow.org/v1alpha1", "TrainJob"): "TrainerV1alpha1TrainJob",
    ("jobset.x-k8s.io/v1alpha2", "JobSet"): "JobsetV1alpha2JobSet",
    ("kubeflow.org/v1", "PyTorchJob"): "KubeflowOrgV1PyTorchJob",
}
# Names in version 1 of Kubeflow's package for types that the other one has.
_SHARED = {
    "V1ObjectMeta": "IoK8sApimachineryPkgApisMetaV1ObjectMeta",
    "V1PodTemplateSpec": "IoK8sApiCoreV1PodTemplateSpec",
}
_PLAIN = {"int": int, "str": str, "bool": bool}


def find_problems(document: dict[str, Any]) -> list[str]:
    """Return what the schema of the document's kind says against it, each with its place."""
    name = _MODELS[document["apiVersion"], document["kind"]]
    return list(_problems(name, document, ()))


def _problems(name: str, value: Any, place: tuple[Any, ...]) -> Iterator[str]:
    """Yield the problems of a value of the type that a package calls ``name``."""
    name = _SHARED.get(name, name)
    if of_values := re.fullmatch(r"(?:dict\(str, |list\[)(\w+)[)\]]", name):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _problems(of_values[1], each, (*place, key))
    elif hasattr(kubeflow_v1, name):
        yield from _problems_v1(getattr(kubeflow_v1, name), value, place)
    elif hasattr(kubeflow_v2, name):
        yield from _problems_v2(getattr(kubeflow_v2, name), value, place)
    elif type(value) is not _PLAIN[name]:
        yield f"{_path(place)}: {value!r} is not of type {name}"


def _problems_v1(model: type, value: dict[str, Any], place: tuple[Any, ...]) -> Iterator[str]:
    types = {model.attribute_map[field]: kind for field, kind in model.openapi_types.items()}
    for key, each in value.items():
        if key in types:
            yield from _problems(types[key], each, (*place, key))
        else:
            yield f"{_path((*place, key))}: there is no such field"


def _problems_v2(
    model: type[BaseModel], value: dict[str, Any], place: tuple[Any, ...]
) -> Iterator[str]:
    try:
        model.model_validate(value, extra="forbid", by_alias=True, by_name=False)
    except ValidationError as error:
        for problem in error.errors():
            of_scalar = _SCALARS.get(problem.get("ctx", {}).get("class_name"))
            if of_scalar is None or not of_scalar(problem["input"]):
                yield f"{_path((*place, *problem['loc']))}: {problem['msg']}"


def _path(place: tuple[Any, ...]) -> str:
    return ".".join(map(str, place))
