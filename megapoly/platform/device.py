"""Choose the device and its communication backend."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
from dataclasses import dataclass

import torch

from megapoly.errors import UnavailableError
from megapoly.platform import launcher
from megapoly.platform.compile_cache import check_compile_cache
from megapoly.platform.machine import Machine


@dataclass(frozen=True)
class Platform:
    """A CPU or a GPU, with everything that differs between them.

    Args:
        device: where parameters and activations are.
        backend: ``torch.distributed`` backend of that device.
    """

    device: torch.device
    backend: str

    @property
    def is_cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        """Wait until the device has finished its work; return at once on CPU."""
        if self.is_cuda:
            torch.cuda.synchronize()

    def describe(self) -> str:
        """Return the device's name for logs, such as ``NVIDIA H100`` or ``CPU, 2 threads``."""
        if self.is_cuda:
            return torch.cuda.get_device_name(self.device)
        threads = torch.get_num_threads()
        return f"CPU, {threads} thread{'s' if threads > 1 else ''}"


def this_machine() -> Machine:
    """Describe this machine, without importing packages that need a GPU's libraries."""
    cuda = torch.cuda.is_available()
    version = None
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        version = importlib.metadata.version("transformer_engine")
    return Machine(
        cuda=cuda,
        compute_capability=torch.cuda.get_device_capability() if cuda else None,
        transformer_engine=importlib.util.find_spec("transformer_engine") is not None,
        transformer_engine_version=version,
        apex=importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None,
        cuda_version=_two_numbers(torch.version.cuda),
    )


def _two_numbers(version: str | None) -> tuple[int, int] | None:
    """Return (12, 9) for ``12.9``."""
    if version is None:
        return None
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def default_device() -> str:
    """Return ``cuda`` if torch finds a CUDA device, else ``cpu``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(name: str, device: str) -> None:
    """Check that tensors can be made on a device.

    Args:
        name: of the option, for the message.
        device: as torch names it.

    Raises:
        UnavailableError: they cannot; with torch's reason.
    """
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise UnavailableError(f"`{name}` ({device}) cannot be used: {reason}") from error


def select_platform(device: str) -> Platform:
    """Set up the device and make the engine usable on it; call once, before building anything.

    Args:
        device: ``cpu``, ``cuda``, or ``auto`` (CUDA if available). On CUDA ``LOCAL_RANK`` is the
            number of the GPU.

    Raises:
        UnavailableError: CUDA is requested and not available, or another user could have put code
            into the cache of ``torch.compile``.
    """
    check_compile_cache()
    if device == "auto":
        device = default_device()
    from megapoly.platform import engine_workarounds

    engine_workarounds.install_on_every_device()
    if device == "cuda":
        if not torch.cuda.is_available():
            raise UnavailableError(
                "`training.device` is cuda, but torch finds no CUDA device "
                f"(torch {torch.__version__}); use `--training.device cpu`, or install a CUDA "
                "build of torch on a machine with a GPU."
            )
        local_rank = launcher.local_rank()
        torch.cuda.set_device(local_rank)
        engine_workarounds.install_without_transformer_engine()
        engine_workarounds.install_with_transformer_engine()
        return Platform(torch.device("cuda", local_rank), "nccl")
    engine_workarounds.install_on_cpu()
    return Platform(torch.device("cpu"), "gloo")
