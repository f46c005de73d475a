from pathlib import Path

import pytest

from megapoly.config import Config, load_yaml
from megapoly.errors import ConfigError
from megapoly.study.comparison.trials import (
    Trial,
    Variant,
    check_comparable,
    options_of_some,
    parse_variants,
    rate_trials,
    seed_trials,
    sizes,
    with_tasks,
)

CONFIGS = Path(__file__).parents[3] / "examples/configs"


def base(name: str = "dense_miniature") -> Config:
    config = load_yaml(CONFIGS / f"{name}.yaml")
    config.model.vocab_size = 2048
    return config


def test_a_trial_sets_activation_rate_seed_and_folder_alone() -> None:
    common = base()
    common.optimizer.lr, common.optimizer.min_lr = 3e-3, 1.5e-4
    common.optimizer.lr_warmup_init = 3e-4
    trial = Trial(Variant("polyrelu", 4), lr=6e-3, seed=2)
    config = trial.config(common, Path("out"))
    assert trial.name == "polyrelu_order_4.lr_0.006.seed_2"
    assert config.run_dir == "out/polyrelu_order_4.lr_0.006.seed_2"
    assert (config.model.activation, config.model.activation_order) == ("polyrelu", 4)
    assert config.optimizer.lr == 6e-3
    assert config.optimizer.min_lr == pytest.approx(3e-4)
    assert config.optimizer.lr_warmup_init == pytest.approx(6e-4)
    assert (config.training.seed, config.data.seed) == (2, 2)
    assert common.training.seed == common.data.seed == 1234, "the base stays as it is"
    config.run_dir, config.model, config.optimizer = common.run_dir, common.model, common.optimizer
    config.training.seed = config.data.seed = 1234
    assert config == common


def test_orders_are_of_activations_with_powers() -> None:
    variants = parse_variants(["swiglu", "polyrelu", "polynorm:4"], [2, 3])
    assert [(v.name, v.order) for v in variants] == [
        ("swiglu", None),
        ("polyrelu_order_2", 2),
        ("polyrelu", 3),
        ("polynorm_order_4", 4),
    ]


def test_orders_that_nothing_reads_are_refused() -> None:
    assert parse_variants(["polyrelu", "gelu"], None)[0].order == 3
    with pytest.raises(ConfigError, match=r"`--orders` \(2 4\) has no effect"):
        parse_variants(["swiglu", "polyrelu:3"], [2, 4])


def test_options_go_to_the_activations_that_have_them() -> None:
    common = base("moe_miniature")
    common.model.activation_eps, common.model.activation_norm = 1e-3, "l2"
    common.model.activation_coefficients = "per_expert"
    common.model.activation_backend = "reference"
    variants = parse_variants(["swiglu", "polyrelu", "polynorm", "gated_polynorm"], None)
    expected = {
        "swiglu": (1e-6, "rms", "shared", "auto"),
        "polyrelu": (1e-6, "rms", "per_expert", "reference"),
        "polynorm": (1e-3, "l2", "per_expert", "reference"),
        "gated_polynorm": (1e-3, "l2", "per_expert", "reference"),
    }
    for variant in variants:
        model = Trial(variant, 1e-3, 1).config(common, Path("out")).model
        assert (
            model.activation_eps,
            model.activation_norm,
            model.activation_coefficients,
            model.activation_backend,
        ) == expected[variant.activation]
    assert options_of_some(common, variants) == {
        "activation_coefficients": ["polyrelu", "polynorm", "gated_polynorm"],
        "activation_backend": ["polyrelu", "polynorm", "gated_polynorm"],
        "activation_norm": ["polynorm", "gated_polynorm"],
        "activation_eps": ["polynorm", "gated_polynorm"],
    }
    assert options_of_some(common, variants[2:]) == {}, "all of them have all options"
    message = r"`model.activation_norm` \(l2\) has no effect with any .* \(swiglu, polyrelu\)"
    with pytest.raises(ConfigError, match=message) as error:
        options_of_some(common, variants[:2])
    assert len(error.value.problems) == 2


def test_all_mistakes_in_names_are_told() -> None:
    with pytest.raises(ConfigError) as error:
        parse_variants(["swiglo", "gelu:2", "polynorm:5", "relu", "relu"], None)
    assert len(error.value.problems) == 4
    text = str(error.value)
    assert "the nearest is swiglu" in text
    assert "the order of `gelu:2` must be none: gelu has no powers" in text
    assert "the order of `polynorm:5` must be 2, 3 or 4" in text
    assert "relu is named twice" in text


def test_the_grid_has_one_seed_and_the_seeds_have_the_chosen_rates() -> None:
    swiglu, polynorm = Variant("swiglu", None), Variant("polynorm", 3)
    grid = rate_trials([swiglu, polynorm], [1e-3, 2e-3], seed=7)
    assert [(t.variant, t.lr, t.seed) for t in grid] == [
        (swiglu, 1e-3, 7),
        (polynorm, 1e-3, 7),
        (swiglu, 2e-3, 7),
        (polynorm, 2e-3, 7),
    ]
    rest = seed_trials({swiglu: [1e-3], polynorm: [1e-3, 2e-3]}, [8, 9])
    assert [(t.variant, t.lr, t.seed) for t in rest] == [
        (swiglu, 1e-3, 8),
        (polynorm, 1e-3, 8),
        (polynorm, 2e-3, 8),
        (swiglu, 1e-3, 9),
        (polynorm, 1e-3, 9),
        (polynorm, 2e-3, 9),
    ]


@pytest.mark.parametrize("name", ["dense_miniature", "moe_miniature"])
def test_parameters_of_the_recipes_are_equal_but_for_coefficients(name: str) -> None:
    variants = parse_variants(["swiglu", "gelu", "polynorm", "polyrelu:4", "polyprelu"], None)
    swiglu, gelu, polynorm, polyrelu_4, polyprelu = sizes(base(name), variants)
    layers = 4
    assert gelu == swiglu
    assert polynorm - gelu == 4 * layers  # a0 .. a3
    assert polyrelu_4 - gelu == 5 * layers
    assert polyprelu - gelu == 5 * layers  # and a slope
    check_comparable(base(name), variants)


def test_models_of_other_size_are_refused() -> None:
    config = base()
    config.model.scale_gated_ffn = False
    variants = parse_variants(["gelu", "swiglu"], None)
    gelu, swiglu = sizes(config, variants)
    with pytest.raises(ConfigError, match=f"swiglu has {swiglu:,}, gelu {gelu:,}"):
        check_comparable(config, variants)


def test_a_comparison_needs_evaluations_and_checkpoints() -> None:
    config = base()
    config.training.eval_interval, config.checkpoint.save = 0, False
    with pytest.raises(ConfigError, match=r"eval_interval.*\n.*`checkpoint.save`"):
        check_comparable(config, [Variant("gelu", None)])


def test_tasks_come_after_the_last_step() -> None:
    config = with_tasks(base(), ["piqa"], "questions", 50)
    assert config.training.eval_tasks == ["piqa"]
    assert config.training.eval_tasks_interval == config.training.train_iters == 2000
    assert (config.training.eval_tasks_data, config.training.eval_tasks_limit) == ("questions", 50)
    assert base().training.eval_tasks is None
