from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from megapoly.config.options import OPTIONS, options_of
from megapoly.config.parsing import (
    Arguments,
    DryRunOptions,
    help_text,
    load_yaml,
    parse,
    to_dict,
    to_yaml,
)
from megapoly.config.schema import BlendSource, Config, ValidationSet
from megapoly.errors import ConfigError


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: {num_layers: 6}\ntraining: {train_iters: 7}\n", encoding="utf-8")
    return path


def read(recipe: Path, *words: str) -> Config:
    return parse(words, default_recipe=recipe, program="megapoly train").config


def problems(recipe: Path, *words: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read(recipe, *words)
    return caught.value.problems


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_default_recipe(recipe: Path) -> None:
    assert parse([], default_recipe=recipe, program="x") == Arguments(load_yaml(recipe), False)
    assert load_yaml(recipe).model.num_layers == 6
    assert load_yaml(recipe).model.hidden_size == Config().model.hidden_size


def test_config_replaces_default_recipe(recipe: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other.yaml", "model: {hidden_size: 64}")
    config = read(recipe, "--config", str(other))
    assert (config.model.num_layers, config.model.hidden_size) == (4, 64)
    both = read(recipe, f"--config={recipe}", f"--config={other}")
    assert (both.model.num_layers, both.model.hidden_size) == (6, 64)


def test_empty_recipe_is_the_defaults(tmp_path: Path) -> None:
    assert load_yaml(write(tmp_path / "a.yaml", "")) == Config()
    assert load_yaml(write(tmp_path / "b.yaml", "model:\nrun_dir: runs/default\n")) == Config()


def test_overrides_in_both_forms_and_any_order(recipe: Path) -> None:
    words = ["--model.num_layers", "8", "--optimizer.lr=3e-4", "--config", str(recipe)]
    config = read(recipe, *words, "--run_dir", "out", "--training.bf16", "true")
    assert config.model.num_layers == 8
    assert config.optimizer.lr == 3e-4
    assert config.run_dir == "out"
    assert config.training.bf16 is True
    assert config.training.train_iters == 7


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("training.train_tokens", "250e9", 250_000_000_000),
        ("training.train_tokens", "5e12", 5_000_000_000_000),
        ("training.train_tokens", "250_000_000_000", 250_000_000_000),
        ("model.vocab_size", "null", None),
        ("optimizer.lr", "1", 1.0),
        ("optimizer.lr", "3e-4", 3e-4),
        ("model.rotary_base", "5e5", 500_000),
        ("model.qk_norm", "full", "full"),
        ("model.transformer_engine", "null", None),
        ("run_dir", "123", "123"),
        ("run_dir", "a: b", "a: b"),
        ("run_dir", "null", "null"),
        ("data.tokenizer", "1e3", "1e3"),
        ("data.tokenizer", "null", None),
        ("data.blend", "[a, b]", ["a", "b"]),
        ("data.blend", "[{path: a, weight: 1}, b]", [BlendSource("a", weight=1.0), "b"]),
        ("data.blend", "[{path: a, tokens: 250e9}]", [BlendSource("a", tokens=250_000_000_000)]),
        ("data.blend", "[{path: a, epochs: 2, name: n}]", [BlendSource("a", epochs=2.0, name="n")]),
        ("data.blend", "null", None),
        (
            "data.validation",
            "{books: a, wiki: {path: [b, c], weight: 2}, c4: [d]}",
            {"books": "a", "wiki": ValidationSet(["b", "c"], 2.0), "c4": ["d"]},
        ),
        ("parallel.recompute_modules", "[core_attn, mlp]", ["core_attn", "mlp"]),
    ],
)
def test_values_of_the_command_line(recipe: Path, key: str, text: str, value: object) -> None:
    section, _, name = key.rpartition(".")
    config = read(recipe, f"--{key}={text}")
    read_value = getattr(getattr(config, section) if section else config, name)
    assert read_value == value
    assert type(read_value) is type(value)


@pytest.mark.parametrize("number", ["3e-4", "3.0e-4", "0.0003", "3E-4"])
def test_floats_of_yaml(tmp_path: Path, number: str) -> None:
    config = load_yaml(write(tmp_path / "a.yaml", f"optimizer: {{lr: {number}}}"))
    assert config.optimizer.lr == 3e-4


@pytest.mark.parametrize(
    ("key", "text", "words"),
    [
        ("model.num_layers", "four", ["'four'", "a whole number"]),
        ("model.num_layers", "4.5", ["4.5", "a whole number"]),
        ("model.num_layers", "null", ["null", "a whole number"]),
        ("model.num_layers", "true", ["True", "a whole number"]),
        ("model.num_layers", "[", ["'['", "a whole number"]),
        ("model.num_query_groups", "x", ["'x'", "a whole number, or null"]),
        ("optimizer.lr", "fast", ["'fast'", "a finite number"]),
        ("optimizer.lr", ".nan", ["nan", "a finite number"]),
        ("optimizer.lr", ".inf", ["inf", "a finite number"]),
        ("training.bf16", "3", ["3", "true or false"]),
        ("model.qk_norm", "ful", ["'ful'", "one of none, head, full"]),
        ("model.moe_router_dtype", "fp8", ["'fp8'", "one of fp32, fp64, or null"]),
        ("data.blend", "a", ["'a'", "a list of prefixes and sources such as [a, {path: b"]),
        ("data.blend", "[1]", ["entry `1`", "is 1", "a prefix or a mapping with a `path`"]),
        ("data.blend", "[a, null]", ["entry `2`", "is null", "a mapping with a `path`"]),
        ("data.blend", "[{weight: 1}]", ["entry `1`", "has no `path`", "prefix"]),
        ("data.blend", "[{path: a, weigth: 1}]", ["`weigth`", "entry `a`", "nearest is `weight`"]),
        ("data.blend", "[{path: a, name: n, weight: x}]", ["`weight` is 'x'", "number", "`n`"]),
        ("data.blend", "[{path: a, tokens: 1.5}]", ["`tokens` is 1.5", "a whole number"]),
        ("data.blend", "[{path: [a]}]", ["`path` is ['a']", "must be text"]),
        ("data.validation", "[a]", ["['a']", "named sets such as {name: a,"]),
        ("data.validation", "{b: {path: [1]}}", ["`path` is [1]", "`b`", "or a list such as"]),
        ("data.validation", "{b: 3}", ["`b`", "is 3", "a list of prefixes"]),
        ("data.validation", "{2024: a}", ["2024", "quote"]),
        ("parallel.recompute_modules", "[ffn]", ["['ffn']", "a list of core_attn, mlp, moe"]),
    ],
)
def test_wrong_type_names_field_value_and_expected(
    recipe: Path, key: str, text: str, words: list[str]
) -> None:
    (problem,) = problems(recipe, f"--{key}", text)
    for word in [f"`{key}`", *words]:
        assert word in problem


def test_every_mistake_in_a_blend_is_reported(tmp_path: Path) -> None:
    text = "data: {blend: [{path: a, wieght: 2, tokens: x}, 3], validation: {v: {weight: 1}}}"
    found = problems(write(tmp_path / "a.yaml", text))
    assert len(found) == 4
    assert all("a.yaml" in problem for problem in found)
    for word in (
        "`wieght`",
        "`tokens` is 'x'",
        "entry `2`",
        "entry `v` of `data.validation` has no",
    ):
        assert word in "\n".join(found)


@pytest.mark.parametrize("text", ["123", "on", "1e3", "null"])
def test_yaml_text_must_be_text(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="`run_dir` is .*must be text .*quote"):
        load_yaml(write(tmp_path / "a.yaml", f"run_dir: {text}"))


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("model.num_layer", "model.num_layers"),
        ("model.num-layers", "model.num_layers"),
        ("num_layers", "model.num_layers"),
        ("training.hidden_size", "model.hidden_size"),
        ("tensor_parallel_size", "parallel.tensor_model_parallel_size"),
        ("rundir", "run_dir"),
        ("optimiser.lr", "optimizer.lr"),
        ("train.seed", "training.seed"),
        ("data.seeds", "data.seed"),
    ],
)
def test_unknown_key_names_the_nearest(
    recipe: Path, tmp_path: Path, key: str, nearest: str
) -> None:
    message = f"unknown option `{key}`; the nearest is `{nearest}`"
    assert problems(recipe, f"--{key}", "1") == [message]
    assert problems(recipe, f"--{key}=1") == [message]
    section, _, name = key.rpartition(".")
    path = write(tmp_path / "a.yaml", f"{section}: {{{name}: 1}}" if section else f"{name}: 1")
    (problem,) = problems(path)
    if section in ("", *to_dict(Config())):
        assert problem == f"unknown option `{key}` in {path}; the nearest is `{nearest}`"
    else:
        assert f"unknown option `{section}` in {path}" in problem


def test_all_mistakes_are_reported_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "model: {num_layer: 3, hidden_size: four}\nfoo: 1\n")
    found = problems(path, "--optimizer.lr", "x", "--model.qknorm", "full", "stray", "--data.seed")
    assert len(found) == 7
    text = "\n".join(found)
    for word in ("num_layer`", "'four'", "`foo`", "'x'", "qk_norm", "`stray`", "needs a value"):
        assert word in text


def test_a_misspelled_section_of_a_recipe_names_the_nearest_section(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "trainig: {train_iters: 4}\ntrain_iters: 4\n")
    first, second = problems(path)
    assert first == f"unknown option `trainig` in {path}; the nearest is `training`"
    assert second.endswith("the nearest is `training.train_iters`")


def test_sections_are_not_values(recipe: Path, tmp_path: Path) -> None:
    (problem,) = problems(recipe, "--model", "x.yaml")
    assert problem == "`model` is a section; set its options, such as `model.num_layers`"
    (problem,) = problems(write(tmp_path / "a.yaml", "model: 5"))
    assert "`model`" in problem and "is a section" in problem


@pytest.mark.parametrize("words", [["--model.num_layers"], ["--model.num_layers", "--run_dir=x"]])
def test_value_is_missing(recipe: Path, words: list[str]) -> None:
    assert problems(recipe, *words) == ["`--model.num_layers` needs a value: a whole number"]


def test_config_needs_a_file(recipe: Path, tmp_path: Path) -> None:
    assert "needs a file" in problems(recipe, "--config")[0]
    (problem,) = problems(recipe, "--config", str(tmp_path / "absent.yaml"))
    assert "absent.yaml" in problem and "cannot be read" in problem


@pytest.mark.parametrize("text", ["model: [", "- a\n- b", "just text", "a: b: c", "? {a: b}\n: c"])
def test_files_that_are_no_recipe(tmp_path: Path, text: str) -> None:
    path = write(tmp_path / "a.yaml", text)
    (problem,) = problems(path)
    assert str(path) in problem


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("model: {num_layers: 3}\nrun_dir: x\nmodel: {num_layers: 4}", "model"),
        ("model:\n  num_layers: 3\n\n  num_layers: 4", "num_layers"),
        ("data: {blend: [{path: a,\n weight: 1,\n path: b}]}", "path"),
    ],
)
def test_repeated_key_is_refused(tmp_path: Path, text: str, key: str) -> None:
    (problem,) = problems(write(tmp_path / "a.yaml", text))
    assert problem.startswith(f"`{key}` is twice in ")
    assert "lines 1 and 3" in problem or "lines 2 and 4" in problem


def test_steps_on_the_command_line_replace_tokens_of_the_recipe(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.yaml",
        "training: {train_tokens: 250e9}\noptimizer: {lr_warmup_tokens: 1e6, lr_decay_iters: 5}",
    )
    config = read(path, "--training.train_iters", "50", "--optimizer.lr_decay_tokens", "1e9")
    assert (config.training.train_iters, config.training.train_tokens) == (50, None)
    assert config.optimizer.lr_warmup_tokens == 1_000_000
    assert config.optimizer.lr_decay_iters is None
    assert config.optimizer.lr_decay_tokens == 1_000_000_000
    assert read(path, "--training.train_iters", "null").training.train_tokens == 250_000_000_000


def test_both_forms_in_one_source_are_kept_for_the_rules(recipe: Path) -> None:
    config = read(recipe, "--training.train_iters", "50", "--training.train_tokens", "1e6")
    assert (config.training.train_iters, config.training.train_tokens) == (50, 1_000_000)


def test_yaml_round_trip(tmp_path: Path) -> None:
    config = Config(run_dir="1e3")
    config.optimizer.lr, config.optimizer.adam_eps = 3e-4, 1e-15
    config.training.train_tokens = 5_000_000_000_000
    config.data.tokenizer, config.data.cache_dir = "null", "it's: x # y"
    texts = ["on", "3e-4", "010", "1:30", "a\nb", "é", "2024-01-01", "[a]", "1_0", " x "]
    mapping = BlendSource("data/*_text", tokens=250_000_000_000, name="on")
    config.data.blend = [*texts, mapping, BlendSource("3e-4", weight=0.1), BlendSource("null")]
    config.data.validation = {"1": ["a"], "no": [], "3e4": ["~"], "x": "1e3"}
    config.data.validation |= {"y": ValidationSet("2"), "z": ValidationSet(["a", "3"], 0.5)}
    path = write(tmp_path / "a.yaml", to_yaml(config))
    assert load_yaml(path) == config
    assert "epochs" not in path.read_text()  # of a source, what is null is left out


def test_dictionary_holds_plain_values() -> None:
    assert to_dict(Config()) == dataclasses.asdict(Config())
    assert yaml.safe_load(yaml.safe_dump(to_dict(Config()))) == to_dict(Config())


def test_help_has_every_option_with_its_description(recipe: Path) -> None:
    text = help_text("megapoly train", recipe)
    words = " ".join(text.split())
    for key, option in OPTIONS.items():
        assert f"--{key}" in text
        assert len(option.description) > 10, key
        assert " ".join(option.description.replace("``", "`").split()) in words, key
    for entry in (BlendSource, ValidationSet):
        for name in options_of(entry):
            assert f"`{name}`:" in words
    assert "--config RECIPE" in text and "--print-config" in text
    assert "--model.qk_norm {none,head,full}" in text
    assert "--parallel.sequence_parallel {true,false,null}" in text
    assert f"Default: {Config().model.ffn_hidden_size}." in words
    assert "Default: [core_attn]." in words and "Default: null." in words


def test_help_exits_and_needs_no_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(["--help"], default_recipe=Path("absent.yaml"), program="megapoly train")
    assert stopped.value.code == 0
    assert "usage: megapoly train" in capsys.readouterr().out


def test_dry_run_has_options_of_its_own(recipe: Path) -> None:
    def dry_run(*words: str) -> DryRunOptions | None:
        return parse(words, default_recipe=recipe, program="x").dry_run

    assert dry_run() is None
    assert dry_run("--dry_run") == DryRunOptions(world_size=None, gpu="a100-80g")
    for words in (["--world-size", "64"], ["--world_size=64"]):
        assert dry_run("--dry-run", *words, "--gpu", "h200") == DryRunOptions(64, "h200")
    for words, problem in (
        (["--world-size", "64"], "without `--dry-run`"),
        (["--dry-run", "--world-size", "0"], r"\(0\) must be a number of ranks"),
        (["--dry-run", "--world-size"], "must be a number of ranks"),
        (["--dry-run", "--gpu"], "`--gpu` needs a name: a100-80g, "),
        (["--dry-run", "--print_config"], "choose one"),
    ):
        with pytest.raises(ConfigError, match=problem):
            dry_run(*words)
