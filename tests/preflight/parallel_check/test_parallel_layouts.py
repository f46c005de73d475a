"""Names of layouts, and which are checked."""

import itertools

import pytest

from megapoly.config import Config
from megapoly.errors import ConfigError
from megapoly.preflight.layouts import Layout, all_layouts, covering, parse_layout

WORLD_SIZES = (1, 2, 4, 8)


def every(world_size, num_experts=8, is_allowed=lambda layout: True):
    return all_layouts(world_size, num_experts=num_experts, is_allowed=is_allowed)


@pytest.mark.parametrize("num_experts", [None, 8])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_name_says_everything(world_size, num_experts):
    layouts = every(world_size, num_experts)
    assert len({layout.name for layout in layouts}) == len(layouts)
    for layout in layouts:
        assert layout.world_size == world_size
        read = parse_layout(layout.name)
        config = Config()
        assert read.applied_to(config) == layout.applied_to(config)
        assert read.world_size == world_size


def test_a_name_becomes_options():
    config = Config()
    parallel = parse_layout("tp2-cp2-pp2-vpp3-ep4-etp1-dp2-a2a-distopt").applied_to(config).parallel
    assert parallel.tensor_model_parallel_size == 2
    assert parallel.context_parallel_size == 2
    assert parallel.pipeline_model_parallel_size == 2
    assert parallel.virtual_pipeline_model_parallel_size == 3
    assert parallel.expert_model_parallel_size == 4
    assert parallel.expert_tensor_parallel_size == 1
    assert parallel.sequence_parallel is True
    assert parallel.cp_comm_type == "a2a"
    assert parallel.use_distributed_optimizer
    assert parallel.overlap_grad_reduce and parallel.overlap_param_gather
    assert parse_layout("tp2-nosp").applied_to(config).parallel.sequence_parallel is False
    assert config == Config()


@pytest.mark.parametrize(
    ("name", "world_size"),
    [("1", 1), ("tp2", 2), ("ep4", 4), ("tp2-ep4", 8), ("tp2-ep4-etp1", 4), ("tp2-dp3", 6)],
)
def test_experts_bring_the_replicas_that_they_need(name, world_size):
    assert parse_layout(name).world_size == world_size


@pytest.mark.parametrize("name", ["tp", "xp2", "tp2-", "tp0", "tp2_pp2", ""])
def test_unknown_names_are_refused(name):
    with pytest.raises(ConfigError, match=r"parts are tp2, cp2, .*, nosp, a2a, distopt"):
        parse_layout(name)


def test_replicas_fill_the_processes():
    assert parse_layout("tp2").at(8) == Layout(tensor_model_parallel_size=2, data_parallel_size=4)
    assert parse_layout("tp4").at(6) is None


def test_all_layouts_of_two_processes():
    dense = ["cp2", "cp2-a2a", "cp2-a2a-distopt", "cp2-distopt", "dp2", "dp2-distopt", "pp2"]
    dense += ["pp2-vpp2", "tp2", "tp2-nosp"]
    assert sorted(layout.name for layout in every(2, None)) == dense
    # Experts want sequence parallelism; without their own sizes they are cut as the rest is.
    names = {layout.name for layout in every(2)}
    assert names >= set(dense) - {"tp2-nosp"}
    assert names >= {"ep2-dp2", "etp2-dp2", "cp2-ep2", "cp2-etp2", "tp2-etp1", "tp2-ep2-etp1"}
    assert {layout.name for layout in every(2, 3)}.isdisjoint({"ep2-dp2", "tp2-ep2-etp1"})


def test_rules_choose():
    layouts = every(2, None, lambda layout: "pp" not in layout.forms)
    assert {"pp2", "pp2-vpp2"}.isdisjoint(layout.name for layout in layouts) and layouts


@pytest.mark.parametrize("strength", [2, 3])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_few_layouts_have_all_choices_together(world_size, strength):
    layouts = every(world_size)
    forms = sorted({form for layout in layouts for form in layout.forms})

    def together(layouts):
        return {
            tuple((form, form in layout.forms) for form in chosen)
            for layout in layouts
            for chosen in itertools.combinations(forms, strength)
        }

    chosen = covering(layouts, strength)
    assert together(chosen) == together(layouts)
    assert len(chosen) <= 30
