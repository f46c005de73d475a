"""The choice of the device."""

from __future__ import annotations

import pytest
import torch

from megapoly.errors import UnavailableError
from megapoly.platform import select_platform
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
