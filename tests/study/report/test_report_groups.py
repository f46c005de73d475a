import pytest
from made_runs import write_run

from megapoly.study.report.grouping import group_runs
from megapoly.study.report.html import _apart, _equal, _title
from megapoly.study.report.run_tables import learning_rates, warnings
from megapoly.study.report.runs import read_run


def groups_of(tmp_path, *runs, reference="swiglu"):
    """Groups of runs given by their options."""
    read = []
    for i, options in enumerate(runs):
        losses = options.pop("losses", [3.0] * 4)
        evaluations = {len(losses): {"a": options.pop("loss", 2.0)}}
        folder = write_run(tmp_path / f"run_{i}", losses, evaluations=evaluations, **options)
        read.append(read_run(folder))
    return group_runs(read, reference)


@pytest.mark.parametrize(
    "other",
    [
        {"source": "e" * 16},
        {"source": None},
        {"losses": [3.0] * 5},
        {"overrides": ("--training.seq_length", "32")},
        # As many tokens.
        {"overrides": ("--training.global_batch_size", "8"), "losses": [3.0] * 2},
        {"overrides": ("--model.num_moe_experts", "4")},
        {"overrides": ("--model.ffn_hidden_size", "288")},
        {"overrides": ("--training.eval_iters", "3")},
    ],
)
def test_what_may_not_be_compared_is_apart(tmp_path, other):
    alike = [{"activation": "swiglu"}, {"activation": "relu"}]
    first, second = groups_of(tmp_path, *alike, {"activation": "gelu", **other})
    assert {len(first.runs), len(second.runs)} == {2, 1}
    moe = "num_moe_experts" in str(other)
    assert {first.slug, second.slug} == {"dense", "moe" if moe else "dense_2"}


def test_experts_of_a_token_make_another_group_though_all_parameters_are_as_many(tmp_path):
    experts = ("--model.num_moe_experts", "4")
    first, second = groups_of(
        tmp_path,
        {"activation": "swiglu", "overrides": experts},
        {"activation": "swiglu", "overrides": (*experts, "--model.moe_router_topk", "3")},
    )
    assert first.runs[0].parameters == second.runs[0].parameters
    active = f"{second.runs[0].active_parameters:,}"
    assert _title(second, [first, second]).endswith(f"{active} active parameters")
    said = f"active parameters ({active} here, {first.runs[0].active_parameters:,} there)"
    assert said in _apart(second, [first, second])


def test_another_order_of_the_data_is_said(tmp_path):
    (group,) = groups_of(tmp_path, {"activation": "swiglu"}, {"activation": "relu"})
    assert "in the same order for each seed" in _equal(group)
    group.entries[1].runs[0].data["fingerprint"] = "another"
    assert "not in the same order in all runs of a seed" in _equal(group)


def test_unfinished_runs_are_in_no_group(tmp_path):
    (group,) = groups_of(tmp_path, {"activation": "swiglu"}, {"activation": "relu", "steps": 9})
    assert [entry.label for entry in group.entries] == ["SwiGLU"]


def test_labels_of_orders_and_options(tmp_path):
    (group,) = groups_of(
        tmp_path,
        {"activation": "swiglu"},
        {"activation": "relu"},
        {"activation": "polynorm"},
        {"activation": "polynorm", "overrides": ("--model.activation_norm", "l2")},
        {"activation": "polyrelu"},
        {"activation": "polyrelu", "overrides": ("--model.activation_order", "2")},
        {"activation": "relu", "overrides": ("--model.init_method_std", "0.05")},
        {"activation": "swiglu", "overrides": ("--model.init_method_std", "0.05")},
    )
    assert [entry.label for entry in group.entries] == [
        "SwiGLU",
        "SwiGLU; init_method_std 0.05",
        "ReLU",
        "ReLU; init_method_std 0.05",
        "PolyReLU r=2",
        "PolyReLU r=3",
        "PolyNorm",
        "PolyNorm; activation_norm l2",
    ]
    by_label = {entry.label: entry for entry in group.entries}
    assert group.reference is by_label["SwiGLU"]
    # With the same options if such an entry exists; SwiGLU has no norm to choose.
    changed = by_label["ReLU; init_method_std 0.05"]
    assert group.reference_for(changed) is by_label["SwiGLU; init_method_std 0.05"]
    other_norm = by_label["PolyNorm; activation_norm l2"]
    assert group.reference_for(other_norm) is by_label["SwiGLU"]
    assert [entry.label for entry in group.main] == ["SwiGLU", "ReLU", "PolyReLU r=3", "PolyNorm"]


def test_options_that_nothing_of_the_activation_reads_make_no_other_model(tmp_path):
    overrides = ("--model.activation_norm", "l2", "--model.activation_order", "4")
    (group,) = groups_of(
        tmp_path, {"activation": "relu"}, {"activation": "relu", "seed": 2, "overrides": overrides}
    )
    assert [sorted(entry.seeds) for entry in group.entries] == [["1", "2"]]


def test_a_floor_that_does_not_follow_the_rate_makes_another_model(tmp_path):
    following = [{"lr": 1e-3}, {"lr": 2e-3, "seed": 2}]
    (group,) = groups_of(tmp_path / "following", *following)
    assert len(group.entries) == 1
    other = {"lr": 2e-3, "seed": 3, "overrides": ("--optimizer.min_lr", "1e-5")}
    (group,) = groups_of(tmp_path / "other", {"lr": 1e-3}, {"lr": 1e-3, "seed": 2}, other)
    assert [entry.plain for entry in group.entries] == [True, False]


def test_rate_with_most_seeds_then_with_the_lowest_loss(tmp_path):
    rates = [{"lr": 1e-3, "loss": 2.1}, {"lr": 2e-3, "loss": 2.0}, {"lr": 4e-3, "loss": 2.2}]
    (group,) = groups_of(tmp_path / "one", *[dict(rate) for rate in rates])
    assert group.entries[0].lr == 2e-3
    more = {"lr": 1e-3, "loss": 1.0, "seed": 2}
    (group,) = groups_of(tmp_path / "two", *rates, more)
    entry = group.entries[0]
    assert entry.lr == 1e-3
    # Of the seed that all have, not of that which one rate has besides.
    assert entry.scores == {1e-3: 2.1, 2e-3: 2.0, 4e-3: 2.2}


def test_same_model_rate_and_seed_counts_once(tmp_path):
    (group,) = groups_of(tmp_path, {"loss": 2.0}, {"loss": 3.0})
    assert [run.name for run in group.runs] == ["run_1"]
    assert [(old.name, new.name) for old, new in group.repeated] == [("run_0", "run_1")]


def test_of_rates_with_as_many_seeds_the_best_over_all_of_these_counts(tmp_path):
    """The first seed alone, which a third rate also has, prefers the other one."""
    ends = {1e-3: {1: 3.0, 2: 3.4}, 2e-3: {1: 3.1, 2: 3.1}, 4e-3: {1: 3.5}}
    runs = [
        read_run(
            write_run(
                tmp_path / f"{lr}.{seed}", [4.0, end], lr=lr, seed=seed, evaluations={2: {"a": end}}
            )
        )
        for lr, seeds in ends.items()
        for seed, end in seeds.items()
    ]
    (group,) = group_runs(runs, "swiglu")
    assert group.entries[0].lr == 2e-3
    ((_, cells),) = learning_rates(group).rows
    assert [(cell.text, cell.below, cell.best) for cell in cells] == [
        ("3.000", "2 seeds: 3.200", False),
        ("3.100", "2 seeds: 3.100", True),
        ("3.500", "1 seed", False),
    ]
    assert not [text for text in warnings(group) if "best at" in text or "shown at" in text]
