"""Packages by what they are for, with the releases that work: what megapoly's installation says."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

NAME = "megapoly"
EXTRA_USES = {
    "hf": "megapoly export, import and generate",
    "eval": "megapoly evaluate, benchmarks during training",
    "data": "megapoly preprocess",
    "report": "megapoly report and compare, figures of analyze and theory",
    "s3": "URLs of s3://",
    "watch": "logging.export: Prometheus and OpenTelemetry",
}


def packages_of(requirements: Iterable[str], extra: str = "") -> dict[str, str]:
    """Return the packages of an extra by name, each with the releases that it allows.

    Args:
        requirements: of an installed package, as ``importlib.metadata.requires`` returns them.
        extra: name; '': what is installed without any extra.
    """
    parsed = [Requirement(text) for text in requirements]
    packages: dict[str, str] = {}
    for each in parsed:
        if not _applies(each, extra) or (extra and _applies(each, "")):
            continue
        if each.name != NAME:
            packages[each.name] = _lower_bound_first(each.specifier)
        for other in each.extras if each.name == NAME else ():
            packages |= packages_of(map(str, parsed), other)
    return packages


def _applies(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _lower_bound_first(specifier: SpecifierSet) -> str:
    return ",".join(sorted(map(str, specifier), reverse=True))


try:
    PYTHON = importlib.metadata.metadata(NAME)["Requires-Python"]
    _REQUIREMENTS = importlib.metadata.requires(NAME) or []
except importlib.metadata.PackageNotFoundError:  # a checkout; `checks` reports it
    PYTHON, _REQUIREMENTS = "", []

# Without these nothing can be trained.
REQUIRED = {"torch": "", "megatron-core": ""}
REQUIRED |= packages_of(_REQUIREMENTS) | packages_of(_REQUIREMENTS, "train")
EXTRAS = {extra: packages_of(_REQUIREMENTS, extra) for extra in EXTRA_USES}
# apex is built from NVIDIA's sources, Triton comes with torch's builds for CUDA.
GPU = dict.fromkeys(("transformer-engine", "flash-attn", "apex", "triton"), "")
GPU |= {name: text for name, text in packages_of(_REQUIREMENTS, "gpu").items() if name in GPU}

KNOWN_COMBINATIONS = (
    "With megatron-core 0.16: torch 2.13.0, with which this project's tests pass on CPU (2.7 to "
    "2.13 can be installed); Transformer Engine 2.9 to 2.11, the releases that the engine's own "
    "package requires, as in NVIDIA's PyTorch images 25.11 (2.9.0) to 26.01 (2.11.0, torch 2.10)."
)


def all_packages() -> tuple[str, ...]:
    """Return every package's name once."""
    extras = [name for packages in EXTRAS.values() for name in packages]
    return tuple(dict.fromkeys([NAME, *REQUIRED, *GPU, *extras]))
