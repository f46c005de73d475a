"""Gather facts: packages, torch, GPUs, limits of the system. ``checks`` judges them."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

# How long importing a package may take; from a shared disk it is slow.
_TIMEOUT_S = 60.0
# Imported in a process each, since what was built for another torch or CUDA may crash: modules by
# the name of the package. Others are few files in plain Python, or wheels that fit.
IMPORTED = {
    "megatron-core": "megatron.core.models.gpt",
    "transformer-engine": "transformer_engine.pytorch",
    "apex": "amp_C, apex.optimizers, apex.multi_tensor_apply",
    "flash-attn": "flash_attn",
    "triton": "triton",
}
_TORCH = """
import json, torch, torch.distributed as dist
print(json.dumps(dict(
    cuda_build=torch.version.cuda,
    cudnn=torch.backends.cudnn.version(),
    nccl=".".join(map(str, torch.cuda.nccl.version())) if dist.is_nccl_available() else None,
    gloo=dist.is_gloo_available(),
    sees_cuda=torch.cuda.is_available(),
)))
"""
_QUERY = ("name", "driver_version", "memory.total", "compute_cap")


@dataclass(frozen=True)
class TorchFacts:
    """What torch reports about itself.

    Args:
        cuda_build: CUDA that it was built for; None: a build for CPU.
        cudnn: its number, such as 91300; None: torch has no cuDNN.
        nccl: version; None: torch has no NCCL.
        gloo: whether it has gloo.
        sees_cuda: whether there is a device that it can use.
    """

    cuda_build: str | None = None
    cudnn: int | None = None
    nccl: str | None = None
    gloo: bool = True
    sees_cuda: bool = False


@dataclass(frozen=True)
class GPUFacts:
    """What nvidia-smi reports about one GPU.

    Args:
        name: the same as torch's.
        driver: version.
        memory_mib: all of its memory.
        capability: compute capability, such as 8.0.
    """

    name: str
    driver: str
    memory_mib: str
    capability: str


@dataclass(frozen=True)
class SystemFacts:
    """Limits of the machine, or of the container.

    Args:
        cores: cores that this process may use.
        memory_bytes: memory of the machine, or the container's limit.
        open_files: files that a process may have open.
        locked_bytes: memory that a process may lock; None: no limit.
        shm_bytes: size of /dev/shm; None: there is none.
        infiniband: adapters that the kernel has.
        infiniband_usable: whether this process can open them.
        compiler: the compiler that torch.compile uses on CPU.
        compiler_found: whether it is on PATH.
    """

    cores: int
    memory_bytes: int
    open_files: int
    locked_bytes: int | None
    shm_bytes: int | None
    infiniband: tuple[str, ...]
    infiniband_usable: bool
    compiler: str
    compiler_found: bool


@dataclass(frozen=True)
class DoctorFacts:
    """All facts.

    Args:
        python: version.
        versions: of packages by name; None: not installed.
        failures: why an installed package cannot be imported, by name.
        torch: None: it is missing or cannot be imported.
        gpus: GPUs of this machine, whether torch sees them or not.
        system: limits.
    """

    python: str
    versions: dict[str, str | None]
    failures: dict[str, str]
    torch: TorchFacts | None
    gpus: tuple[GPUFacts, ...]
    system: SystemFacts


def gather(packages: Sequence[str]) -> DoctorFacts:
    """Return the facts of this machine.

    Args:
        packages: names of the packages whose versions matter.
    """
    versions = {name: _version(name) for name in packages}
    programs = {"torch": _TORCH} | {name: f"import {what}" for name, what in IMPORTED.items()}
    programs = {name: text for name, text in programs.items() if versions.get(name) is not None}
    outputs, failures = _run_together(programs)
    torch = TorchFacts(**json.loads(outputs["torch"])) if "torch" in outputs else None
    return DoctorFacts(
        platform.python_version(), versions, failures, torch, _gpus(), system_facts()
    )


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _run_together(programs: dict[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Run the programs at once; return last lines of output, and why the others failed, by name."""
    # Count devices by the driver's library: a context would take memory of a GPU in use.
    environment = os.environ | {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    processes = {
        name: subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", program],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for name, program in programs.items()
    }
    outputs, failures = {}, {}
    for name, process in processes.items():
        try:
            output, errors = process.communicate(timeout=_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            failures[name] = f"it was not imported after {_TIMEOUT_S:g} s"
            continue
        if process.returncode == 0:
            outputs[name] = _last_line(output)
        else:
            ended = f"the process ended with {process.returncode}"
            failures[name] = _last_line(errors) or ended
    return outputs, failures


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]


def _gpus() -> tuple[GPUFacts, ...]:
    command = shutil.which("nvidia-smi")
    if command is None:
        return ()
    query = [command, f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits"]
    try:
        result = subprocess.run(query, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return parse_gpus(result.stdout) if result.returncode == 0 else ()


def parse_gpus(output: str) -> tuple[GPUFacts, ...]:
    """Parse nvidia-smi's csv, one line a GPU."""
    rows = [[value.strip() for value in line.split(",")] for line in output.splitlines()]
    return tuple(GPUFacts(*row) for row in rows if len(row) == len(_QUERY))


def system_facts() -> SystemFacts:
    """Return the limits of this process and its machine."""
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    adapters = Path("/sys/class/infiniband")
    # torch.compile uses this one and does not look for others.
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    return SystemFacts(
        cores=_cores(),
        memory_bytes=_memory_bytes(),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        locked_bytes=None if locked == resource.RLIM_INFINITY else locked,
        shm_bytes=_or_none(lambda: shutil.disk_usage("/dev/shm").total),
        infiniband=tuple(sorted(path.name for path in adapters.iterdir()))
        if adapters.is_dir()
        else (),
        infiniband_usable=any(
            os.access(path, os.R_OK | os.W_OK) for path in Path("/dev/infiniband").glob("uverbs*")
        ),
        compiler=compiler,
        compiler_found=shutil.which(compiler) is not None,
    )


def _cores() -> int:
    if sys.platform != "linux":
        return os.cpu_count() or 1
    cores = len(os.sched_getaffinity(0))
    try:
        limit = cores_of_quota(Path("/sys/fs/cgroup/cpu.max").read_text())
    except OSError:
        limit = None
    return cores if limit is None else min(cores, limit)


def cores_of_quota(text: str) -> int | None:
    """Return the whole cores of a control group's ``cpu.max``; None: all.

    Args:
        text: microseconds of CPU time, or ``max``, and the period that they are for.
    """
    quota, period = text.split()
    return None if quota == "max" else max(1, int(quota) // int(period))


def _memory_bytes() -> int:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _or_none(lambda: int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return memory if limit is None else min(memory, limit)


def _or_none(read: Callable[[], int]) -> int | None:
    try:
        return read()
    except (OSError, ValueError):  # absent; "max"
        return None
