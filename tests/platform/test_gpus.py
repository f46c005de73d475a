"""Names of devices, and peaks as data sheets print them."""

from __future__ import annotations

from itertools import chain

import pytest

from megapoly.platform.gpus import GPUS, gpu_of_device

# As torch.cuda.get_device_name gave them on machines.
SEEN = {
    "NVIDIA A100-SXM4-80GB": "a100-80g",
    "A100-SXM4-40GB": "a100-40g",
    "NVIDIA A100-SXM4-40GB": "a100-40g",
    "NVIDIA A100 80GB PCIe": "a100-80g-pcie",
    "NVIDIA A100-PCIE-40GB": "a100-40g-pcie",
    "NVIDIA H100 80GB HBM3": "h100-80g",
    "NVIDIA H100 NVL": "h100-94g-nvl",
    "NVIDIA H100 PCIe": "h100-80g-pcie",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
}
# Slices, other kinds whose names contain one of ours, and devices that are not GPUs.
UNKNOWN = [
    "NVIDIA A100-SXM4-80GB MIG 1g.10gb",
    "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
    "NVIDIA GH200 480GB",
    "NVIDIA H200 NVL",
    "NVIDIA GB200",
    "NVIDIA A800-SXM4-80GB",
    "NVIDIA A100-SXM-64GB",
    "NVIDIA L40S",
    "CPU, 2 threads",
    "",
]
# TFLOP/s "with sparsity" in bf16 and FP8 as data sheets have them; the A100's has both bf16 peaks.
PRINTED = {
    "a100-80g": (624, None),
    "a100-40g": (624, None),
    "a100-80g-pcie": (624, None),
    "a100-40g-pcie": (624, None),
    "h100-80g": (1979, 3958),
    "h100-94g-nvl": (1671, 3341),
    "h100-80g-pcie": (1513, 3026),
    "h200": (1979, 3958),
    "b200": (4500, 9000),
}
# GB/s of the memory, and of the links in both directions together.
BANDWIDTHS = {
    "a100-80g": (2039, 600),
    "a100-40g": (1555, 600),
    "a100-80g-pcie": (1935, 64),
    "a100-40g-pcie": (1555, 64),
    "h100-80g": (3350, 900),
    "h100-94g-nvl": (3900, 128),
    "h100-80g-pcie": (2000, 128),
    "h200": (4800, 900),
    "b200": (62_000 / 8, 1800),
}


@pytest.mark.parametrize("device_name", SEEN)
def test_devices_by_name(device_name):
    assert gpu_of_device(device_name) is GPUS[SEEN[device_name]]


@pytest.mark.parametrize("device_name", UNKNOWN)
def test_what_is_not_in_the_table_is_none(device_name):
    assert gpu_of_device(device_name) is None


def test_no_name_is_that_of_two_kinds():
    names = list(chain.from_iterable(gpu.device_names for gpu in GPUS.values()))
    assert len(names) == len(set(names))
    assert set(SEEN.values()) == GPUS.keys()


@pytest.mark.parametrize("name", GPUS)
def test_peaks_are_half_of_those_with_sparsity(name):
    bf16, fp8 = PRINTED[name]
    assert GPUS[name].bf16_flops == bf16 / 2 * 1e12
    assert GPUS[name].fp8_flops == (None if fp8 is None else fp8 / 2 * 1e12)


@pytest.mark.parametrize("name", GPUS)
def test_bandwidths_are_those_of_data_sheets(name):
    memory, both_directions = BANDWIDTHS[name]
    assert GPUS[name].memory_bandwidth == memory * 1e9
    assert GPUS[name].link_bandwidth == both_directions / 2 * 1e9
