"""The images' files, as far as they can be checked without building an image."""

from __future__ import annotations

import fnmatch
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name
from packaging.version import Version
from sources import ROOT, needs_git, needs_make, requirements, source_files, values_of_make

DOCKERFILES = ["docker/Dockerfile", "docker/Dockerfile.cpu"]
# docker/Dockerfile says where from.
GPU_IMAGE = {
    "torch": "2.10.0a0+a36e1d39eb.nv26.01.42222806",
    "transformer_engine": "2.11.0+c188b533",
    "triton": "3.6.0",
}


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    lines = (ROOT / dockerfile).read_text().splitlines()
    text = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    joined = text.replace("\\\n", " ").splitlines()
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined) if word]


def is_ignored(path: str) -> bool:
    """As docker reads .dockerignore: a pattern is of a whole path, or of a folder above."""
    patterns = (ROOT / ".dockerignore").read_text().splitlines()
    parts = path.split("/")
    above = ["/".join(parts[:n]) for n in range(1, len(parts) + 1)]
    for pattern in (line for line in patterns if line and not line.startswith("#")):
        any_depth = pattern.startswith("**/")
        for name in above:
            if any_depth and fnmatch.fnmatch(name.rsplit("/", 1)[-1], pattern[3:]):
                return True
            same_depth = name.count("/") == pattern.count("/")
            if not any_depth and same_depth and fnmatch.fnmatch(name, pattern):
                return True
    return False


def pins() -> dict[str, Version]:
    lines = (ROOT / "docker/constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_what_is_copied_exists_and_reaches_the_builder(dockerfile: str) -> None:
    copies = [rest.split() for word, rest in instructions(dockerfile) if word == "COPY"]
    sources = [source for *group, _ in copies for source in group]
    assert sources[-1] == "." and "setup.py" in sources
    for source in sources:
        assert (ROOT / source).exists() and not is_ignored(source), source


@needs_git
def test_context_is_the_tracked_files() -> None:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    tracked = listed.stdout.splitlines()
    assert [path for path in tracked if is_ignored(path)] == []
    for path in (
        ".git/config",
        ".venv/bin/python",
        "runs/a/b",
        "data/x.bin",
        "megapoly.egg-info/x",
        # As the head of pretrain.sbatch has them in the checkout.
        "megapoly.sqsh",
        "megapoly-4711.log",
    ):
        assert is_ignored(path), path
    assert is_ignored("megapoly/data/__pycache__/corpus.pyc") and not is_ignored("megapoly/data")


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_layers_of_the_user_and_of_torch(dockerfile: str) -> None:
    """The log that useradd makes is as long as the UID is high; torch's index lacks our pins."""
    (user,) = [rest for word, rest in instructions(dockerfile) if "useradd" in rest]
    assert "useradd --no-log-init " in user
    steps = [step for _, rest in instructions(dockerfile) for step in rest.split("&&")]
    assert all("--no-deps" in step for step in steps if "download.pytorch.org" in step)


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_image_runs_as_a_user_and_asks_doctor(dockerfile: str) -> None:
    found = instructions(dockerfile)
    assert [rest for word, rest in found if word == "USER"] == ["$UID:$GID"]
    assert [rest for word, rest in found if word == "WORKDIR"] == ["/opt/megapoly"]
    (check,) = [rest for word, rest in found if word == "HEALTHCHECK"]
    assert check.endswith('CMD ["megapoly", "doctor"]')
    (base,) = [rest for word, rest in found if word == "FROM"]
    defaults = dict(rest.split("=", 1) for word, rest in found if word == "ARG")
    base = defaults[base.removeprefix("$")] if base.startswith("$") else base
    assert re.fullmatch(r"[\w./-]+:\d[\w.-]+", base), "a stated release"
    # Any user may write there (--user), and nothing in a home folder of the build is needed.
    assert any("chmod 0777 /home/megapoly" in rest for word, rest in found if word == "RUN")
    assert any("HOME=/home/megapoly USER=" in rest for word, rest in found if word == "ENV")
    # Dependencies are a layer below the sources.
    words = [word if word != "COPY" else rest for word, rest in found]
    assert words.index("RUN", words.index("setup.py pyproject.toml ./")) < words.index(". .")


def test_every_requirement_is_pinned_to_what_setup_takes() -> None:
    pinned = pins()
    lists = requirements()
    for requirement in [*lists[""], *lists["test"]]:
        version = pinned[canonicalize_name(requirement.name)]
        assert version in requirement.specifier, requirement


def test_gpu_image_has_what_setup_takes() -> None:
    """An installed pre-release of torch counts, or pip would replace NVIDIA's."""
    lists = requirements()
    (torch,) = [r for r in lists[""] if r.name == "torch"]
    (engine,) = [r for r in lists["gpu"] if r.name == "transformer-engine"]
    (triton,) = [r for r in lists["test"] if r.name == "triton"]
    # As pip checks what is installed.
    assert torch.specifier.contains(GPU_IMAGE["torch"], prereleases=True)
    assert not torch.specifier.contains("2.14.0a0+x.nv27.01", prereleases=True)
    assert engine.specifier.contains(GPU_IMAGE["transformer_engine"])
    assert triton.specifier.contains(GPU_IMAGE["triton"])
    text = (ROOT / "docker/Dockerfile").read_text()
    assert all(version in text for version in GPU_IMAGE.values())


def test_gpu_image_keeps_its_packages() -> None:
    (install,) = [rest for _, rest in instructions("docker/Dockerfile") if "pip install" in rest]
    steps = [" ".join(step.split()) for step in install.split("&&")]
    files = 'docker/constraints.txt ${PINS:+"$PINS"}'
    pins = steps.index(f"python docker/pins.py {files} >/tmp/pins.txt")
    (pip,) = [step for step in steps if step.startswith("pip install")]
    assert "--constraint /tmp/pins.txt " in pip and steps.index(pip) > pins


def test_pins_leave_out_what_the_image_brings(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("docker_pins", ROOT / "docker/pins.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    lines = ["# comment", "PyYAML==6.0.3", "flash_attn==2.8", "lm_eval==0.4.13", ""]
    kept = module.pins_of_absent(lines, ["pyyaml", "Flash-Attn", "torch"])
    assert kept == ["lm_eval==0.4.13"]
    # Those of a later file replace those of an earlier one.
    assert module.pins_of_absent([*lines, "lm-eval==1.0"], ["PyYAML", "flash-attn"]) == [
        "lm-eval==1.0"
    ]
    # The command, in this environment: torch is installed, and so is not printed.
    file = tmp_path / "pins.txt"
    file.write_text("torch==2.13.0\nnot-to-be-found==1.0\n")
    command = [sys.executable, str(ROOT / "docker/pins.py"), str(file)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert printed == "not-to-be-found==1.0\n"


def test_the_other_base_is_for_an_engine_that_setup_does_not_take_yet() -> None:
    """As docker/Dockerfile says of it; an entry of its table when it does."""
    text = (ROOT / "docker/constraints-26.06.txt").read_text()
    (pin,) = [line for line in text.splitlines() if line and not line.startswith("#")]
    name, _, version = pin.partition("==")
    assert name == "megatron-core"
    (engine,) = [each for each in requirements()["train"] if each.name == name]
    assert pins()[name] in engine.specifier and version not in engine.specifier
    dockerfile = (ROOT / "docker/Dockerfile").read_text()
    assert f"#     {version} " in dockerfile and "docker/constraints-26.06.txt" in dockerfile


@needs_make
def test_cpu_image_has_what_tests_open_beside() -> None:
    (install,) = [rest for _, rest in instructions("docker/Dockerfile.cpu") if "[test]" in rest]
    for packages in values_of_make("TRANSFORMERS_4", "TRANSFORMER_ENGINE").values():
        assert packages in " ".join(install.split())


@needs_git
@needs_make
def test_linters_take_every_file() -> None:
    """What `make check` passes to hadolint and shellcheck is every file of that kind."""
    assigned = values_of_make("DOCKERFILES", "SHELL_SCRIPTS", "SHELL_AND_PYTHON")
    found = [path.name for path in (ROOT / "docker").glob("Dockerfile*")]
    assert sorted(f"docker/{name}" for name in found) == sorted(assigned["DOCKERFILES"].split())
    scripts = []
    for path in source_files():
        file = ROOT / path
        if file.stat().st_size < 1_000_000 and file.read_bytes().startswith(b"#!/usr/bin/env bash"):
            scripts.append(path)
    both = [path for path in scripts if path.startswith("examples/pretrain_")]
    assert sorted(set(scripts) - set(both)) == sorted(assigned["SHELL_SCRIPTS"].split())
    assert sorted(both) == sorted(assigned["SHELL_AND_PYTHON"].split())
