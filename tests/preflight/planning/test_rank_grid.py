"""Groups of ranks are the engine's, and links follow from where these ranks are."""

from __future__ import annotations

import pytest
from megatron.core.parallel_state import RankGenerator
from small_models import EXPERTS, small_model

from megapoly.platform.gpus import GPUS
from megapoly.preflight.planning.collectives import collectives
from megapoly.preflight.planning.rank_grid import GroupLink, RankGrid

A100 = GPUS["a100-80g"]
LAYOUTS = [  # world size; tp, cp, pp, ep, etp
    (64, 1, 1, 1, 4, 1),
    (64, 4, 2, 2, 4, 2),
    (64, 2, 1, 4, 2, 2),
    (48, 2, 3, 2, 4, 1),
]


def grid(world_size, tp, cp, pp, ep, etp):
    config = small_model(
        EXPERTS
        | {
            "parallel.tensor_model_parallel_size": tp,
            "parallel.context_parallel_size": cp,
            "parallel.pipeline_model_parallel_size": pp,
            "parallel.expert_model_parallel_size": ep,
            "parallel.expert_tensor_parallel_size": etp,
        }
    )
    return RankGrid.of(config, world_size)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_groups_are_the_engines(layout):
    world_size, tp, cp, pp, ep, etp = layout
    found = grid(*layout)
    order = "tp-cp-ep-dp-pp"  # the engine's default
    dense = RankGenerator(tp=tp, ep=1, dp=world_size // (tp * cp * pp), pp=pp, cp=cp, order=order)
    experts = RankGenerator(
        tp=etp, ep=ep, dp=world_size // (etp * ep * pp), pp=pp, cp=1, order=order
    )
    for ours, engines, theirs in (
        (("tp",), dense, "tp"),
        (("cp",), dense, "cp"),
        (("dp",), dense, "dp"),
        (("cp", "dp"), dense, "dp-cp"),
        (("pp",), dense, "pp"),
        (("etp",), experts, "tp"),
        (("ep",), experts, "ep"),
        (("etp", "ep"), experts, "tp-ep"),
        (("edp",), experts, "dp"),
    ):
        expected = sorted(sorted(group) for group in engines.get_ranks(theirs))
        groups = {tuple(found.group(*ours, rank=rank)) for rank in range(world_size)}
        assert sorted(map(list, groups)) == expected


def test_a_link_is_as_fast_as_its_slowest_part():
    # 16 GB over 8 ranks of a node: each gets 7/8 of it at 300 GB/s.
    node = GroupLink.between(list(range(8)), A100)
    assert (node.name, node.gather_time(16e9)) == ("node", pytest.approx(14e9 / 300e9))
    # Over 2 nodes: 8 GB enter a node by 8 adapters of 25 GB/s, and each rank gets 7/8 of what there
    # is from its neighbours, which takes longer.
    both = GroupLink.between(list(range(16)), A100)
    assert (both.name, both.gather_time(16e9)) == ("network", pytest.approx(14e9 / 300e9))
    # One rank of each of 4 nodes: 3/4 by one adapter.
    apart = GroupLink.between([0, 8, 16, 24], A100)
    assert apart.gather_time(16e9) == pytest.approx(12e9 / 25e9)
    # All-to-all of 16 GB a rank: 8 of 16 parts leave the node, 7 go to its other ranks.
    assert both.exchange_time(16e9) == pytest.approx(8e9 / 25e9)
    assert node.exchange_time(16e9) == pytest.approx(14e9 / 300e9)
    assert GroupLink.between([0], A100).name == "none"


def test_a_group_waits_for_the_node_with_the_fewest_of_its_ranks():
    # 8 and 4 ranks: 8/12 of 12 GB enter the second node by 4 adapters of 25 GB/s.
    uneven = GroupLink.between(list(range(12)), A100)
    assert uneven.gather_time(12e9) == pytest.approx(12e9 * 8 / 12 / 4 / 25e9)
    # Of what a rank of that node sends, 8 of 12 parts leave it.
    assert uneven.exchange_time(12e9) == pytest.approx(8e9 / 25e9)


def test_a_pipeline_sends_over_the_network_where_any_rank_has_to():
    options = {
        "parallel.pipeline_model_parallel_size": 2,
        "training.micro_batch_size": 1,
        "training.global_batch_size": 12,
    }
    # Stages of 6: ranks 0 and 6 are on one node, 2 and 8 are not.
    sends = [m for m in collectives(small_model(options), 12, A100, 0) if m.kind == "send"]
    assert sends and all(message.link.name == "network" for message in sends)
