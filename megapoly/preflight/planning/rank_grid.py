"""The place of each rank in the layout, and the links between the ranks of a group.

The engine numbers ranks with tensor parallelism fastest, then context, expert, data and pipeline
(``tp-cp-ep-dp-pp``, parallel_state.py of Megatron-Core 0.16.1). For dense parameters

    rank = tp + TP (cp + CP (dp + DP pp))

and for experts, which split the same ranks of a pipeline stage in another way,

    rank = etp + ETP (ep + EP (edp + EDP pp))
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megapoly.config import Config
from megapoly.config.resolve import data_parallel_size
from megapoly.platform.gpus import GPU

# From the fastest to the slowest.
DENSE_AXES = ("tp", "cp", "dp", "pp")
EXPERT_AXES = ("etp", "ep", "edp", "pp")


@dataclass(frozen=True)
class RankGrid:
    """The ranks of a job as a grid with one axis for each kind of parallelism.

    Args:
        sizes: ranks along each axis, by its name.
        world_size: processes.
    """

    sizes: dict[str, int]
    world_size: int

    @staticmethod
    def of(config: Config, world_size: int) -> RankGrid:
        """Return the grid of a resolved configuration that the rules allow."""
        parallel = config.parallel
        expert_tensor = parallel.expert_tensor_parallel_size
        assert expert_tensor is not None, "resolve first"
        stages = parallel.pipeline_model_parallel_size
        experts = parallel.expert_model_parallel_size
        sizes = {
            "tp": parallel.tensor_model_parallel_size,
            "cp": parallel.context_parallel_size,
            "dp": data_parallel_size(config, world_size),
            "pp": stages,
            "etp": expert_tensor,
            "ep": experts,
            "edp": world_size // (expert_tensor * experts * stages),
        }
        return RankGrid(sizes, world_size)

    def coordinates(self, rank: int) -> dict[str, int]:
        """Return the place of a rank along every axis."""
        places = {}
        for axes in (DENSE_AXES, EXPERT_AXES):
            rest = rank
            for axis in axes:
                rest, places[axis] = divmod(rest, self.sizes[axis])
        return places

    def group(self, *axes: str, rank: int = 0) -> list[int]:
        """Return the ranks that differ from a rank only along these axes, in order.

        Args:
            axes: all of the dense grid, or all of the experts'.
            rank: a rank of the group.
        """
        order = DENSE_AXES if set(axes) <= set(DENSE_AXES) else EXPERT_AXES
        strides, stride = {}, 1
        for axis in order:
            strides[axis] = stride
            stride *= self.sizes[axis]
        places = self.coordinates(rank)
        ranks = [rank - sum(places[axis] * strides[axis] for axis in axes)]
        for axis in axes:
            ranks = [r + i * strides[axis] for r in ranks for i in range(self.sizes[axis])]
        return sorted(ranks)


@dataclass(frozen=True)
class GroupLink:
    """What connects the ranks of a group.

    Args:
        size: number of ranks of the group.
        on_node: largest number of ranks of the group on one node.
        fewest: smallest such number, of the nodes that the group is on.
        nodes: number of nodes that the group is on.
        gpu: has the bandwidths.
    """

    size: int
    on_node: int
    fewest: int
    nodes: int
    gpu: GPU

    @staticmethod
    def between(ranks: list[int], gpu: GPU) -> GroupLink:
        """Return the link of a group; ranks are numbered node by node."""
        nodes: dict[int, int] = {}
        for rank in ranks:
            node = rank // gpu.gpus_per_node
            nodes[node] = nodes.get(node, 0) + 1
        counts = nodes.values()
        return GroupLink(len(ranks), max(counts), min(counts), len(nodes), gpu)

    @property
    def name(self) -> str:
        """The slowest part of the link: nothing, the node's own link, or the network."""
        if self.size == 1:
            return "none"
        return "node" if self.nodes == 1 else "network"

    def gather_time(self, size: float) -> float:
        """Return the least seconds of an all-gather or reduce-scatter.

        Every node receives what it does not hold through its ranks' network adapters, and every
        rank receives what the others of its node hold or received through the node's own link.

        Args:
            size: bytes of the whole tensor, that is, of all ranks' shards together.
        """
        through_network = size * (self.size - self.fewest) / self.size / self.fewest
        inside = size * (self.on_node - 1) / self.on_node
        return max(through_network / self.gpu.network_bandwidth, inside / self.gpu.link_bandwidth)

    def exchange_time(self, size: float) -> float:
        """Return the least seconds of an all-to-all in which every rank sends equal parts to all.

        Args:
            size: bytes that one rank holds before.
        """
        to_others = size * (self.size - self.fewest) / self.size
        inside = size * (self.on_node - 1) / self.size
        return max(to_others / self.gpu.network_bandwidth, inside / self.gpu.link_bandwidth)

    def send_time(self, size: float) -> float:
        """Return the least seconds to send ``size`` bytes to one rank."""
        bandwidth = self.gpu.link_bandwidth if self.nodes == 1 else self.gpu.network_bandwidth
        return size / bandwidth


def num_nodes(world_size: int, gpu: GPU) -> int:
    """Return the number of nodes that the processes are on."""
    return math.ceil(world_size / gpu.gpus_per_node)
