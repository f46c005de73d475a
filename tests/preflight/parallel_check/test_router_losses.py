"""Load balancing and z-loss are those of one process at every expert-parallel size."""

from pathlib import Path

import pytest

from megapoly.config import load_yaml
from megapoly.preflight.layouts import parse_layout
from megapoly.preflight.parallel_check import job
from megapoly.preflight.parallel_check.scaled import scaled_down
from megapoly.testing.jobs import RECIPES, shared_cache


def losses(config, layout):
    steps = job.train_at(config, layout, cache_dir=Path(shared_cache().name), timeout_s=300)
    return [step.losses for step in steps]


@pytest.mark.parametrize(
    "names",
    [["ep2"], pytest.param(["ep4", "ep8", "tp2-ep4-etp1"], marks=pytest.mark.parallel)],
    ids=["2 processes", "4 and 8 processes"],
)
@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_router_losses_do_not_depend_on_where_experts_are(names, dispatcher):
    config = scaled_down(load_yaml(RECIPES / "moe_tiny.yaml"), steps=2, bf16=False)
    config.model.moe_token_dispatcher_type = dispatcher
    expected = losses(config, parse_layout("1"))
    for step in expected:
        assert step.keys() == {"lm_loss", "load_balancing_loss", "z_loss"}
        assert step["load_balancing_loss"] >= 1.0  # of balanced experts, 1
        assert step["z_loss"] > 0.0
    for name in names:
        for actual, step in zip(losses(config, parse_layout(name)), expected, strict=True):
            assert actual == pytest.approx(step, rel=1e-6), name
