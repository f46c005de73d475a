"""The choice of the device."""

from __future__ import annotations

import pytest
import torch

from megapoly.errors import UnavailableError
from megapoly.platform.device import select_platform, this_machine
from megapoly.platform.machine import Machine
from megapoly.testing import run_on_ranks


def test_cuda_without_a_device_is_an_error_that_says_what_to_do(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnavailableError, match="finds no CUDA device.*--training.device cpu"):
        select_platform("cuda")


def platform_of(device):
    platform = select_platform(device)
    platform.synchronize()
    return platform.device, platform.backend, platform.describe()


@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_cpu(device):
    if device == "auto" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    (found,) = run_on_ranks(platform_of, 1, device)
    assert found == (torch.device("cpu"), "gloo", "CPU, 1 thread")


def test_what_is_said_of_a_machine_with_a_gpu_and_its_packages(monkeypatch, tmp_path):
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").write_text("raise ImportError('opened')")
    about = tmp_path / "transformer_engine-2.9.0+70f5366.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Name: transformer_engine\nVersion: 2.9.0+70f5366\n")
    (tmp_path / "fused_weight_gradient_mlp_cuda.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    assert this_machine() == Machine(True, (9, 0), True, "2.9.0+70f5366", True, (12, 9))


def test_what_is_said_of_a_machine_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    machine = this_machine()
    assert not machine.cuda and machine.compute_capability is machine.cuda_version is None
