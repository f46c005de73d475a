"""Which rank has which place in the layout, and which link joins the ranks of a group.

The engine numbers ranks with tensor parallelism fastest, then context, expert, data and pipeline
(``tp-cp-ep-dp-pp``, parallel_state.py of Megatron-Core 0.16.1); dense parts see

    rank = tp + TP (cp + CP (dp + DP pp))

and experts, whose grid is another cut of the same ranks of a pipeline stage,

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
class Grid:
    """Sizes of a layout.

    Args:
        sizes: ranks along each axis, by its name.
        world_size: processes.
    """

    sizes: dict[str, int]
    world_size: int

    @staticmethod
    def of(config: Config, world_size: int) -> Grid:
        """The grid of a resolved configuration that the rules let run."""
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
        return Grid(sizes, world_size)

    def coordinates(self, rank: int) -> dict[str, int]:
        """Place of a rank along every axis."""
        places = {}
        for axes in (DENSE_AXES, EXPERT_AXES):
            rest = rank
            for axis in axes:
                rest, places[axis] = divmod(rest, self.sizes[axis])
        return places

    def group(self, *axes: str, rank: int = 0) -> list[int]:
        """Ranks that differ from a rank along these axes alone, in order.

        Args:
            axes: all of the dense grid, or all of the experts'.
            rank: one of them.
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
class Link:
    """What joins the ranks of a group.

    Args:
        size: ranks of the group.
        on_node: ranks of the group on one node, at most.
        fewest: the same, at least, of the nodes that the group is on.
        nodes: nodes that the group is on.
        gpu: gives the bandwidths.
    """

    size: int
    on_node: int
    fewest: int
    nodes: int
    gpu: GPU

    @staticmethod
    def between(ranks: list[int], gpu: GPU) -> Link:
        """The link of a group, ranks being numbered node by node."""
        nodes: dict[int, int] = {}
        for rank in ranks:
            node = rank // gpu.gpus_per_node
            nodes[node] = nodes.get(node, 0) + 1
        counts = nodes.values()
        return Link(len(ranks), max(counts), min(counts), len(nodes), gpu)

    @property
    def name(self) -> str:
        """What the slowest part of the way is: nothing, the node's own link, or the network."""
        if self.size == 1:
            return "none"
        return "node" if self.nodes == 1 else "network"

    def gather_time(self, size: float) -> float:
        """Least seconds of an all-gather or reduce-scatter.

        Every node has to get what it does not hold through its ranks' network adapters, and every
        rank what the others of its node hold or got through the node's own link.

        Args:
            size: bytes of the whole tensor, that is, of all ranks' parts together.
        """
        through_network = size * (self.size - self.fewest) / self.size / self.fewest
        inside = size * (self.on_node - 1) / self.on_node
        return max(through_network / self.gpu.network_bandwidth, inside / self.gpu.link_bandwidth)

    def exchange_time(self, size: float) -> float:
        """Least seconds of an all-to-all in which every rank sends equal parts to all.

        Args:
            size: bytes that one rank holds before.
        """
        to_others = size * (self.size - self.fewest) / self.size
        inside = size * (self.on_node - 1) / self.size
        return max(to_others / self.gpu.network_bandwidth, inside / self.gpu.link_bandwidth)

    def send_time(self, size: float) -> float:
        """Least seconds to send bytes to one rank."""
        bandwidth = self.gpu.link_bandwidth if self.nodes == 1 else self.gpu.network_bandwidth
        return size / bandwidth


def num_nodes(world_size: int, gpu: GPU) -> int:
    """Nodes that the processes are on."""
    return math.ceil(world_size / gpu.gpus_per_node)
