"""Speed and memory of GPUs and of the links between them: every hardware constant of this project.

Peaks are for dense matrix products (data sheets print twice as much, "with sparsity"), bandwidths
for one direction (data sheets print the sum of both). All are the maker's figures: no kernel and no
collective reaches them, so a time computed from them is a lower bound.

Sources, by the number in ``GPU.source``:

1. NVIDIA A100 Tensor Core GPU data sheet. Node: DGX A100, eight HDR InfiniBand adapters (200 Gb/s)
   for the compute network of eight GPUs.
2. NVIDIA H100 Tensor Core GPU data sheet. Node: DGX H100, eight NDR adapters (400 Gb/s).
3. NVIDIA H200 Tensor Core GPU data sheet. Node: as 2.
4. NVIDIA HGX B200 data sheet, figures of the board divided by its eight GPUs. Node: as 2.

PCIe cards have no NVLink between all GPUs of a node: their link is PCIe x16. The table assumes one
network adapter for each GPU, as fast as in the DGX of its generation, and no bridge between two or
four GPUs: within groups that a bridge joins, a time from this table is not a bound.
"""

from __future__ import annotations

from dataclasses import dataclass

_GB = 1e9
_TERA = 1e12
_GIB = 2**30


@dataclass(frozen=True)
class GPU:
    """One kind of GPU in its usual node.

    Args:
        name: value of ``--gpu``, such as ``a100-80g``.
        device_names: torch's names of it, without the leading ``NVIDIA``, which old drivers leave
            out. Names match in full: one may be part of another (H200, GH200, H200 NVL).
        compute_capability: major and minor.
        memory: bytes that torch reports, to a GiB; the driver keeps some of the data sheet's.
        memory_bandwidth: bytes a second.
        bf16_flops: operations a second of dense matrix products in bf16.
        fp8_flops: the same in FP8; None without FP8 units.
        link_bandwidth: bytes a second and direction from one GPU to the others of its node.
        network_bandwidth: bytes a second and direction from one GPU to other nodes.
        source: number in the list of this module.
        gpus_per_node: in the usual node.
    """

    name: str
    device_names: tuple[str, ...]
    compute_capability: tuple[int, int]
    memory: int
    memory_bandwidth: float
    bf16_flops: float
    fp8_flops: float | None
    link_bandwidth: float
    network_bandwidth: float
    source: int
    gpus_per_node: int = 8


GPUS: dict[str, GPU] = {
    gpu.name: gpu
    for gpu in (
        GPU(
            name="a100-80g",
            device_names=("A100-SXM4-80GB",),
            compute_capability=(8, 0),
            memory=79 * _GIB,
            memory_bandwidth=2039 * _GB,
            bf16_flops=312 * _TERA,
            fp8_flops=None,
            link_bandwidth=300 * _GB,
            network_bandwidth=25 * _GB,
            source=1,
        ),
        GPU(
            name="a100-40g",
            device_names=("A100-SXM4-40GB",),
            compute_capability=(8, 0),
            memory=39 * _GIB,
            memory_bandwidth=1555 * _GB,
            bf16_flops=312 * _TERA,
            fp8_flops=None,
            link_bandwidth=300 * _GB,
            network_bandwidth=25 * _GB,
            source=1,
        ),
        GPU(
            name="a100-80g-pcie",
            device_names=("A100 80GB PCIe",),
            compute_capability=(8, 0),
            memory=79 * _GIB,
            memory_bandwidth=1935 * _GB,
            bf16_flops=312 * _TERA,
            fp8_flops=None,
            link_bandwidth=32 * _GB,
            network_bandwidth=25 * _GB,
            source=1,
        ),
        GPU(
            name="a100-40g-pcie",
            device_names=("A100-PCIE-40GB",),
            compute_capability=(8, 0),
            memory=39 * _GIB,
            memory_bandwidth=1555 * _GB,
            bf16_flops=312 * _TERA,
            fp8_flops=None,
            link_bandwidth=32 * _GB,
            network_bandwidth=25 * _GB,
            source=1,
        ),
        GPU(
            name="h100-80g",
            device_names=("H100 80GB HBM3",),
            compute_capability=(9, 0),
            memory=79 * _GIB,
            memory_bandwidth=3350 * _GB,
            bf16_flops=989.5 * _TERA,
            fp8_flops=1979 * _TERA,
            link_bandwidth=450 * _GB,
            network_bandwidth=50 * _GB,
            source=2,
        ),
        GPU(
            name="h100-94g-nvl",
            device_names=("H100 NVL",),
            compute_capability=(9, 0),
            memory=93 * _GIB,
            memory_bandwidth=3900 * _GB,
            bf16_flops=835.5 * _TERA,
            fp8_flops=1670.5 * _TERA,
            link_bandwidth=64 * _GB,
            network_bandwidth=50 * _GB,
            source=2,
        ),
        GPU(
            name="h100-80g-pcie",
            device_names=("H100 PCIe",),
            compute_capability=(9, 0),
            memory=79 * _GIB,
            memory_bandwidth=2000 * _GB,
            bf16_flops=756.5 * _TERA,
            fp8_flops=1513 * _TERA,
            link_bandwidth=64 * _GB,
            network_bandwidth=50 * _GB,
            source=2,
        ),
        GPU(
            name="h200",
            device_names=("H200",),
            compute_capability=(9, 0),
            memory=139 * _GIB,
            memory_bandwidth=4800 * _GB,
            bf16_flops=989.5 * _TERA,
            fp8_flops=1979 * _TERA,
            link_bandwidth=450 * _GB,
            network_bandwidth=50 * _GB,
            source=3,
        ),
        GPU(
            name="b200",
            device_names=("B200",),
            compute_capability=(10, 0),
            memory=178 * _GIB,
            memory_bandwidth=7750 * _GB,
            bf16_flops=2250 * _TERA,
            fp8_flops=4500 * _TERA,
            link_bandwidth=900 * _GB,
            network_bandwidth=50 * _GB,
            source=4,
        ),
    )
}


def gpu_of_device(device_name: str) -> GPU | None:
    """Return the GPU with a name of torch's; None if not in the table, or for a slice of a GPU.

    Args:
        device_name: from ``torch.cuda.get_device_name``.
    """
    name = device_name.removeprefix("NVIDIA ")
    return next((gpu for gpu in GPUS.values() if name in gpu.device_names), None)
