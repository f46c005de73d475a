"""From facts of machines that are not here to lines."""

from __future__ import annotations

import importlib.metadata
import re
import runpy
from dataclasses import replace
from pathlib import Path

import pytest

from megapoly.preflight.doctor import requirements
from megapoly.preflight.doctor.checks import Line, examine
from megapoly.preflight.doctor.facts import (
    DoctorFacts,
    GPUFacts,
    SystemFacts,
    TorchFacts,
    cores_of_quota,
    parse_gpus,
)
from megapoly.preflight.doctor.requirements import (
    EXTRAS,
    GPU,
    PYTHON,
    REQUIRED,
    all_packages,
    packages_of,
)

ROOT = Path(__file__).parents[3]

LAPTOP_VERSIONS = (
    dict.fromkeys(all_packages())
    | dict.fromkeys(REQUIRED, "99.0")
    | {"megapoly": "0.1.0", "torch": "2.13.0+cpu", "megatron-core": "0.16.1"}
)
LAPTOP = DoctorFacts(
    python="3.11.7",
    versions=LAPTOP_VERSIONS,
    failures={},
    torch=TorchFacts(),
    gpus=(),
    system=SystemFacts(
        cores=2,
        memory_bytes=16 * 2**30,
        open_files=1024,
        locked_bytes=8 * 2**20,
        shm_bytes=64 * 2**20,
        infiniband=(),
        infiniband_usable=False,
        compiler="g++",
        compiler_found=True,
    ),
)
A100 = "NVIDIA A100-SXM4-80GB"
# As NVIDIA's image 26.01 has them.
NODE = replace(
    LAPTOP,
    versions=LAPTOP_VERSIONS
    | {
        "torch": "2.10.0a0+a36e1d39eb.nv26.1",
        "transformer-engine": "2.11.0+c188b533",
        "flash-attn": "2.7.4.post1",
        "triton": "3.6.0",
    },
    torch=TorchFacts(cuda_build="13.1", cudnn=91701, nccl="2.29.2", sees_cuda=True),
    gpus=8 * (GPUFacts(A100, "590.48.01", "81920", "8.0"),),
    system=replace(
        LAPTOP.system,
        open_files=1048576,
        locked_bytes=None,
        shm_bytes=512 * 2**30,
        infiniband=("mlx5_0", "mlx5_1"),
        infiniband_usable=True,
    ),
)


def with_versions(facts: DoctorFacts, versions: dict[str, str | None]) -> DoctorFacts:
    return replace(facts, versions=facts.versions | versions)


def wrong(facts: DoctorFacts) -> list[Line]:
    return [line for line in examine(facts) if line.status == "wrong"]


def line_of(facts: DoctorFacts, part: str) -> Line:
    (line,) = [line for line in examine(facts) if line.part == part]
    return line


def test_a_laptop_can_train():
    assert wrong(LAPTOP) == []
    assert line_of(LAPTOP, "GPU").use == "training runs on CPU, with gloo"
    missing = {line.part for line in examine(LAPTOP) if line.status == "optional"}
    assert missing >= {*GPU, "extra hf", "extra eval", "extra data", "GPU", "InfiniBand"}


def test_a_node_can_train():
    assert wrong(NODE) == []
    gpu = line_of(NODE, "GPU")
    assert gpu.found == f"8 x {A100}, 80 GiB"
    assert gpu.use == "bf16; a100-80g: 312 TFLOP/s in bf16"
    assert line_of(NODE, "transformer-engine").status == "ok"
    assert "CUDA 13.1, cuDNN 91701, nccl 2.29.2" in line_of(NODE, "torch").use


@pytest.mark.parametrize(
    "facts, part, found, remedy",
    [
        (replace(LAPTOP, python="3.9.18"), "Python", "3.9.18, not >=3.10", "3.10 or later"),
        (
            with_versions(LAPTOP, {"megapoly": None}),
            "megapoly",
            "not installed",
            "pip install -e .",
        ),
        (with_versions(LAPTOP, {"psutil": None}), "psutil", "not installed", "pip install"),
        (with_versions(LAPTOP, {"torch": "2.6.0"}), "torch", "not >=2.7,<2.14", "<2.14"),
        (
            with_versions(LAPTOP, {"megatron-core": "0.17.0"}),
            "megatron-core",
            "0.17.0, not >=0.16.1,<0.17",
            "pip install 'megatron-core>=0.16.1,<0.17'",
        ),
        (
            replace(LAPTOP, failures={"megatron-core": "OSError: no symbol"}),
            "megatron-core",
            "OSError: no symbol",
            "--force-reinstall",
        ),
        (
            with_versions(NODE, {"transformer-engine": "2.12.0+abc"}),
            "transformer-engine",
            "2.12.0+abc, not >=2.9,<2.12",
            "[pytorch]>=2.9,<2.12",
        ),
        (
            with_versions(NODE, {"transformer-engine": "2.8.0"}),
            "transformer-engine",
            "2.8.0",
            ">=2.9",
        ),
        (
            with_versions(
                replace(NODE, failures={"apex": "No module named 'amp_C'"}), {"apex": "0.9.10dev"}
            ),
            "apex",
            "No module named 'amp_C'",
            "PyPI's apex is another project",
        ),
        (
            with_versions(
                LAPTOP, {"transformers": "4.56.0", "accelerate": "1", "safetensors": "1"}
            ),
            "extra hf",
            "transformers 4.56.0, not >=4.57",
            "pip install 'megapoly[hf]'",
        ),
        (
            replace(NODE, torch=TorchFacts()),
            "torch with CUDA",
            "a build for CPU",
            "driver 590.48.01",
        ),
        (
            replace(NODE, torch=replace(NODE.torch, sees_cuda=False)),
            "torch with CUDA",
            "torch sees no device",
            "--gpus all",
        ),
        (
            replace(NODE, system=replace(NODE.system, shm_bytes=64 * 2**20)),
            "/dev/shm",
            "64 MiB, below 1 GiB",
            "--ipc=host",
        ),
        (
            replace(NODE, system=replace(NODE.system, locked_bytes=65536 * 1024)),
            "locked memory",
            "64 MiB",
            "--ulimit memlock=-1",
        ),
        (
            replace(NODE, system=replace(NODE.system, infiniband_usable=False)),
            "InfiniBand",
            "/dev/infiniband is closed",
            "--device /dev/infiniband",
        ),
        (
            replace(LAPTOP, system=replace(LAPTOP.system, open_files=256)),
            "open files",
            "256",
            "ulimit -n",
        ),
        (replace(LAPTOP, torch=TorchFacts(gloo=False)), "gloo", "not in this torch", "PyPI"),
    ],
)
def test_what_is_wrong_has_a_remedy(facts, part, found, remedy):
    bad = [line for line in wrong(facts) if line.part == part]
    assert len(bad) == 1
    assert found in bad[0].found and remedy in bad[0].remedy
    others = {line.part for line in wrong(facts)} - {part}
    # transformers is in two extras.
    assert others <= ({"extra eval"} if part == "extra hf" else set())


@pytest.mark.parametrize("version", ["2.9.0a0+d3d172e", "2.9.0", "2.11.0+c188b533"])
def test_builds_of_images_are_their_releases(version):
    assert wrong(with_versions(NODE, {"transformer-engine": version})) == []


def test_what_needs_a_gpu_to_be_opened_is_no_fault_without_one():
    failures = {"transformer-engine": "OSError: libcuda.so.1"}
    facts = with_versions(replace(LAPTOP, failures=failures), {"transformer-engine": "2.11.0"})
    assert wrong(facts) == []
    assert wrong(with_versions(replace(NODE, failures=failures), {}))


def test_a_gpu_without_a_peak():
    output = "NVIDIA GH200 480GB, 570.1, [N/A], 9.0\n\nNVIDIA L40S, 570.1, 46068, 8.9\n"
    facts = replace(NODE, gpus=parse_gpus(output))
    grace, ada = [line for line in examine(facts) if line.part == "GPU"]
    assert grace.found == "1 x NVIDIA GH200 480GB"
    assert ada.found == "1 x NVIDIA L40S, 45 GiB"
    assert ada.use == "bf16, FP8; peak not known: MFU needs `logging.peak_tflops`"


def test_requirements_are_those_of_the_packaging():
    setup = (ROOT / "setup.py").read_text()
    for name, specifier in {**REQUIRED, **EXTRAS["eval"], **EXTRAS["data"]}.items():
        assert re.search(rf'"{re.escape(name)}(\[\w+\])?{re.escape(specifier)}["<>=;]', setup), name
    assert f'"transformer-engine[pytorch]{GPU["transformer-engine"]}"' in setup
    assert f'python_requires="{PYTHON}"' in setup
    assert REQUIRED.keys() >= {"torch", "megatron-core", "tokenizers"}


def test_a_checkout_that_is_not_installed_has_few_requirements(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "metadata", absent)
    found = runpy.run_path(requirements.__file__)
    assert found["REQUIRED"] == {"torch": "", "megatron-core": ""}
    assert found["all_packages"]() == ("megapoly", *found["REQUIRED"], *GPU)


def test_packages_of_an_extra():
    requires = [
        "torch<2.14,>=2.7",
        "jsonargparse[signatures]>=4.40",
        'uvloop; sys_platform == "never"',
        'accelerate; extra == "hf"',
        'lm-eval>=0.4.12; extra == "eval"',
        'megapoly[hf]; extra == "eval"',
        'triton; sys_platform == "never" and extra == "eval"',
    ]
    assert packages_of(requires) == {"torch": ">=2.7,<2.14", "jsonargparse": ">=4.40"}
    assert packages_of(requires, "hf") == {"accelerate": ""}
    assert packages_of(requires, "eval") == {"lm-eval": ">=0.4.12", "accelerate": ""}


@pytest.mark.parametrize(
    "capability, formats",
    [
        ("7.0", "no bf16 units"),
        ("8.0", "bf16"),
        ("8.9", "bf16, FP8"),
        ("10.0", "bf16, FP8, MXFP8"),
        ("12.0", "bf16, FP8"),  # Transformer Engine has no MXFP8 for it
    ],
)
def test_formats_of_a_gpu_are_those_that_training_takes(capability, formats):
    facts = replace(NODE, gpus=(GPUFacts("a card", "590.48.01", "81920", capability),))
    assert line_of(facts, "GPU").use.split("; ")[0] == formats


def test_a_container_may_use_the_cores_of_its_quota():
    assert cores_of_quota("max 100000\n") is None
    assert cores_of_quota("400000 100000\n") == 4
    assert cores_of_quota("50000 100000\n") == 1
