"""A rank's place in the layout, by the engine's own numbering.

The dry run uses these; the plan, which needs no engine, computes the same in ``rank_grid``, and a
test compares both.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.parallel_state import RankGenerator

from megapoly.config import Config
from megapoly.config.resolve import data_parallel_size

# The default of `initialize_model_parallel` (parallel_state.py:574 of Megatron-Core 0.16.1).
_ORDER = "tp-cp-ep-dp-pp"


@dataclass(frozen=True)
class Coordinates:
    """A rank's place in every group that it belongs to.

    Args:
        tp: among the ranks that share a matrix of attention or dense FFN.
        pp: pipeline stage.
        cp: among the ranks that share a sequence.
        dp: among the replicas of the dense parameters, which share a global batch.
        ep: among the ranks that share the experts of a layer.
        etp: among the ranks that share an expert's matrices.
        edp: among the replicas of its experts.
    """

    tp: int
    pp: int
    cp: int
    dp: int
    ep: int
    etp: int
    edp: int


def coordinates_of_ranks(config: Config, world_size: int) -> list[Coordinates]:
    """Return the coordinates of every rank.

    Args:
        config: resolved, a layout that divides ``world_size``.
        world_size: ranks of the job.
    """
    parallel = config.parallel
    etp, ep = parallel.expert_tensor_parallel_size, parallel.expert_model_parallel_size
    assert etp is not None, "resolved"
    stages = parallel.pipeline_model_parallel_size
    dense = RankGenerator(
        tp=parallel.tensor_model_parallel_size,
        ep=1,
        dp=data_parallel_size(config, world_size),
        pp=stages,
        cp=parallel.context_parallel_size,
        order=_ORDER,
    )
    # The engine makes these groups also without experts.
    expert = RankGenerator(
        tp=etp, ep=ep, dp=world_size // (etp * ep * stages), pp=stages, cp=1, order=_ORDER
    )
    columns = [_places(dense, name, world_size) for name in ("tp", "pp", "cp", "dp")]
    columns += [_places(expert, name, world_size) for name in ("ep", "tp", "dp")]
    return [Coordinates(*row) for row in zip(*columns, strict=True)]


def _places(generator: RankGenerator, name: str, world_size: int) -> list[int]:
    """Return each rank's place in its group."""
    places = [0] * world_size
    for group in generator.get_ranks(name):
        for place, rank in enumerate(group):
            places[rank] = place
    return places
