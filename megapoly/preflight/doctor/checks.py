"""Judge the facts: what is right, what is missing, and what is wrong, with a remedy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from megapoly.config.fp8 import FP8_RECIPES
from megapoly.platform.gpus import gpu_of_device
from megapoly.preflight.doctor.facts import DoctorFacts, GPUFacts, TorchFacts
from megapoly.preflight.doctor.requirements import EXTRA_USES, EXTRAS, GPU, NAME, PYTHON, REQUIRED

Status = Literal["ok", "optional", "wrong"]

_GIB = 2**30
_MIB = 2**20
# NCCL and loading processes pass data through it; a container has 64 MiB by default.
_LEAST_SHM_BYTES = _GIB
_LEAST_OPEN_FILES = 1024
_PLENTY_OPEN_FILES = 4096


@dataclass(frozen=True)
class Line:
    """One part of the installation or the machine.

    Args:
        part: its name.
        status: ``optional`` means missing, and not needed.
        found: version or size, or why there is none.
        use: what it is for here.
        remedy: how to repair what is wrong, or install what is missing.
    """

    part: str
    status: Status
    found: str
    use: str = ""
    remedy: str = ""


def examine(facts: DoctorFacts) -> list[Line]:
    """Return all lines, in the order to show; training can run if none is ``wrong``."""
    return [
        *_software(facts),
        *_gpu_lines(facts),
        *_gpu_packages(facts),
        *_extras(facts),
        *_system(facts),
    ]


def _fits(version: str, specifier: str) -> bool:
    """Compare as pip does, but take an image's build, such as 2.10.0a0+nv, for its release."""
    try:
        return Version(version).base_version in SpecifierSet(specifier)
    except InvalidVersion:
        return False


def _software(facts: DoctorFacts) -> Iterator[Line]:
    yield _package("Python", facts.python, PYTHON, use="", remedy="install Python 3.10 or later")
    version = facts.versions[NAME]
    use = "" if version else "without it the releases that are needed are not known"
    yield _package(NAME, version, "", use, "pip install -e . in its checkout")
    uses = {"torch": _describe_torch(facts.torch), "megatron-core": "the engine"}
    remaining = []
    for name, specifier in REQUIRED.items():
        remedy = f"pip install '{name}{specifier}'"
        line = _package(
            name, facts.versions[name], specifier, uses.get(name, ""), remedy, facts.failures
        )
        if name in uses or line.status != "ok":
            yield line
        else:
            remaining.append(f"{name} {line.found}")
    yield Line("other packages", "ok", f"{len(remaining)}", ", ".join(remaining))
    if facts.torch is not None:
        yield _gloo(facts.torch)


def _package(
    name: str,
    version: str | None,
    specifier: str,
    use: str,
    remedy: str,
    failures: Mapping[str, str] | None = None,
) -> Line:
    """Return the line of a package that must be installed."""
    if version is None:
        return Line(name, "wrong", "not installed", use, remedy)
    if failures and name in failures:
        return Line(
            name, "wrong", f"{version}; {failures[name]}", use, f"{remedy} --force-reinstall"
        )
    if not _fits(version, specifier):
        return Line(name, "wrong", f"{version}, not {specifier}", use, remedy)
    return Line(name, "ok", version, use)


def _describe_torch(torch: TorchFacts | None) -> str:
    if torch is None:
        return ""
    if torch.cuda_build is None:
        return "a build for CPU"
    cudnn = "no cuDNN" if torch.cudnn is None else f"cuDNN {torch.cudnn}"
    nccl = "no nccl" if torch.nccl is None else f"nccl {torch.nccl}"
    return f"a build for CUDA {torch.cuda_build}, {cudnn}, {nccl}"


def _gloo(torch: TorchFacts) -> Line:
    use = "collectives between CPUs, and next to nccl on GPUs"
    if torch.gloo:
        return Line("gloo", "ok", "in torch", use)
    return Line("gloo", "wrong", "not in this torch", use, "install a torch from PyPI or NVIDIA")


def _gpu_lines(facts: DoctorFacts) -> Iterator[Line]:
    torch = facts.torch
    if not facts.gpus:
        if torch is not None and torch.sees_cuda:
            use = "torch sees one, nvidia-smi does not name it"
            yield Line("GPU", "ok", "one or more", use)
        else:
            yield Line("GPU", "optional", "none", "training runs on CPU, with gloo")
        return
    for name in dict.fromkeys(gpu.name for gpu in facts.gpus):
        same = [gpu for gpu in facts.gpus if gpu.name == name]
        memory = same[0].memory_mib  # "[N/A]" where the GPU shares the CPU's
        size = f", {int(memory) / 1024:.0f} GiB" if memory.isdecimal() else ""
        found = f"{len(same)} x {name}{size}"
        yield Line("GPU", "ok", found, _describe_gpu(same[0]))
    if torch is None:
        return
    driver = f"driver {facts.gpus[0].driver}"
    if torch.cuda_build is None:
        yield Line(
            "torch with CUDA",
            "wrong",
            "torch is a build for CPU",
            "without it training takes the CPU",
            "pip install torch from https://download.pytorch.org/whl/cu130 (or the CUDA that "
            f"{driver} has), or use NVIDIA's image (docker/Dockerfile)",
        )
    elif not torch.sees_cuda:
        yield Line(
            "torch with CUDA",
            "wrong",
            f"torch sees no device; {driver}",
            f"torch was built for CUDA {torch.cuda_build}",
            "update the driver or take a torch for the CUDA that nvidia-smi shows; in a container, "
            "start it with --gpus all; check CUDA_VISIBLE_DEVICES",
        )
    else:
        yield Line("torch with CUDA", "ok", driver, f"built for CUDA {torch.cuda_build}")
    if torch.cuda_build is not None and torch.nccl is None:
        remedy = "install a torch from PyPI or NVIDIA"
        yield Line("nccl", "wrong", "not in this torch", "collectives between GPUs", remedy)


def _describe_gpu(gpu: GPUFacts) -> str:
    known = gpu_of_device(gpu.name)
    major, _, minor = gpu.capability.partition(".")
    capability = (int(major), int(minor)) if minor.isdecimal() else (0, 0)
    formats = ["bf16"] if capability >= (8, 0) else ["no bf16 units"]
    formats += ["FP8"] if FP8_RECIPES["tensorwise"].runs_on(capability) else []
    formats += ["MXFP8"] if FP8_RECIPES["mxfp8"].runs_on(capability) else []
    peak = (
        "peak not known: MFU needs `logging.peak_tflops`"
        if known is None
        else f"{known.name}: {known.bf16_flops / 1e12:g} TFLOP/s in bf16"
    )
    return f"{', '.join(formats)}; {peak}"


def _gpu_packages(facts: DoctorFacts) -> Iterator[Line]:
    has_gpu = bool(facts.gpus) or (facts.torch is not None and facts.torch.sees_cuda)
    yield _gpu_package(
        facts,
        "transformer-engine",
        has_gpu,
        "fused layer norm and linear layers, FP8, flash attention, ring attention (cp_comm_type "
        "p2p); megatron-core 0.16 calls interfaces of 2.9 to 2.11",
        "pip install --no-build-isolation 'transformer-engine[pytorch]>=2.9,<2.12'",
    )
    yield _gpu_package(
        facts,
        "flash-attn",
        has_gpu,
        "one of the attention kernels that Transformer Engine chooses from; cuDNN's is another",
        "pip install --no-build-isolation flash-attn",
    )
    yield _gpu_package(
        facts,
        "apex",
        has_gpu,
        "fused Adam and gradient norm where Transformer Engine is missing; accumulation of weight "
        "gradients inside their products",
        "build NVIDIA's from https://github.com/NVIDIA/apex with --cpp_ext --cuda_ext (PyPI's apex "
        "is another project: pip uninstall apex)",
    )
    yield _gpu_package(
        facts,
        "triton",
        has_gpu,
        "kernels of PolyNorm and PolyReLU on GPUs, torch.compile there",
        "pip install triton",
    )


def _gpu_package(facts: DoctorFacts, name: str, has_gpu: bool, use: str, remedy: str) -> Line:
    """Return the line of a package that is not needed, but does harm if it is broken."""
    version, failure = facts.versions[name], facts.failures.get(name)
    if version is None:
        return Line(name, "optional", "not installed", use, remedy)
    if failure is not None and has_gpu:
        remedy = f"{remedy}, built for this torch and CUDA; or pip uninstall {name}"
        return Line(name, "wrong", f"{version}; {failure}", use, remedy)
    if failure is not None:
        return Line(name, "optional", f"{version}, cannot be imported without a GPU", use)
    if not _fits(version, GPU[name]):
        return Line(name, "wrong", f"{version}, not {GPU[name]}", use, remedy)
    return Line(name, "ok", version, use)


def _extras(facts: DoctorFacts) -> Iterator[Line]:
    for extra, packages in EXTRAS.items():
        part, use, remedy = f"extra {extra}", EXTRA_USES[extra], f"pip install 'megapoly[{extra}]'"
        versions = {name: facts.versions[name] for name in packages}
        missing = [name for name, version in versions.items() if version is None]
        unfit = [
            f"{name} {version}, not {packages[name]}"
            for name, version in versions.items()
            if version is not None and not _fits(version, packages[name])
        ]
        if unfit:
            yield Line(part, "wrong", "; ".join(unfit), use, remedy)
        elif missing:
            yield Line(part, "optional", f"{', '.join(missing)} not installed", use, remedy)
        else:
            found = ", ".join(f"{name} {version}" for name, version in versions.items())
            yield Line(part, "ok", found, use)


def _system(facts: DoctorFacts) -> Iterator[Line]:
    system, has_gpu = facts.system, bool(facts.gpus)
    if system.compiler_found:
        yield Line("C++ compiler", "ok", system.compiler, "torch.compile on CPU")
    else:
        remedy = "apt-get install g++, or set CXX"
        found = f"no {system.compiler} on PATH"
        use = "torch.compile on CPU; without it activations run as plain torch code"
        yield Line("C++ compiler", "optional", found, use, remedy)
    yield Line("cores", "ok", str(system.cores))
    yield Line("memory", "ok", _size(system.memory_bytes))
    yield _open_files(system.open_files)
    yield _shm(system.shm_bytes, has_gpu)
    yield from _infiniband(facts)


def _open_files(limit: int) -> Line:
    use = "data files, and sockets to every rank"
    found = "no limit" if limit < 0 else f"{limit:,}"
    if 0 <= limit < _LEAST_OPEN_FILES:
        return Line("open files", "wrong", found, use, "ulimit -n 65536")
    if 0 <= limit < _PLENTY_OPEN_FILES:
        use += "; ulimit -n 65536 before a job of many nodes or token files"
    return Line("open files", "ok", found, use)


def _shm(size: int | None, has_gpu: bool) -> Line:
    use = "nccl inside a node, and data.num_workers"
    if size is None:
        return Line("/dev/shm", "optional", "none", use)
    if size < _LEAST_SHM_BYTES and has_gpu:
        remedy = "start the container with --ipc=host or --shm-size=8g"
        return Line("/dev/shm", "wrong", f"{_size(size)}, below 1 GiB", use, remedy)
    return Line("/dev/shm", "ok", _size(size), use)


def _infiniband(facts: DoctorFacts) -> Iterator[Line]:
    system, use = facts.system, "the links between nodes"
    if not system.infiniband:
        yield Line("InfiniBand", "optional", "no adapter", use)
        return
    found = f"{len(system.infiniband)}: {', '.join(system.infiniband)}"
    if not system.infiniband_usable:
        remedy = "start the container with --device /dev/infiniband"
        status: Status = "wrong" if facts.gpus else "optional"
        yield Line("InfiniBand", status, f"{found}; /dev/infiniband is closed", use, remedy)
        return
    yield Line("InfiniBand", "ok", found, use)
    locked = system.locked_bytes
    if locked is None:
        yield Line("locked memory", "ok", "no limit", "buffers of InfiniBand")
    else:
        remedy = "ulimit -l unlimited; a container: --ulimit memlock=-1"
        yield Line(
            "locked memory",
            "wrong" if facts.gpus else "optional",
            _size(locked),
            "buffers of InfiniBand",
            remedy,
        )


def _size(num_bytes: int) -> str:
    if num_bytes < _GIB:
        return f"{num_bytes / _MIB:.0f} MiB"
    return f"{num_bytes / _GIB:.1f} GiB"
