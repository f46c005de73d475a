"""Every shipped recipe is found, parses, and is right for the machines it was written for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megapoly.config.options import OPTIONS
from megapoly.config.parsing import load_recipe, load_yaml, parse
from megapoly.config.recipes import FOLDER, recipe_names, recipe_path
from megapoly.config.resolve import lr_decay_iters, lr_warmup_iters, num_microbatches, train_iters
from megapoly.config.rules import find_problems
from megapoly.config.rules.facts import value_of
from megapoly.errors import ConfigError
from megapoly.platform.machine import CPU, Machine

LINKS = Path(__file__).parents[2] / "examples" / "configs"
RECIPES = sorted(FOLDER.glob("*.yaml"))
WORLD_SIZES = {"moe_7b_paper": 64, "moe_7b_released": 64}
WORLD_SIZES |= {"dense_1b_paper": 32, "dense_1b_released": 32}


def test_all_recipes_are_here() -> None:
    assert recipe_names() == [path.stem for path in RECIPES]
    assert {"moe_tiny", "dense_tiny", *WORLD_SIZES} <= {*recipe_names()}


def test_recipes_are_found_by_name_and_by_their_links() -> None:
    assert sorted(path.stem for path in LINKS.iterdir()) == recipe_names()
    for name in recipe_names():
        link = LINKS / f"{name}.yaml"
        assert link.resolve() == recipe_path(name).resolve()
        assert load_recipe(link) == load_recipe(name) == load_yaml(FOLDER / f"{name}.yaml")


def test_files_come_before_installed_recipes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_recipe("moe_tiny").model.num_layers == 4
    (tmp_path / "moe_tiny").write_text("model: {num_layers: 7}")
    assert load_recipe("moe_tiny").model.num_layers == 7
    (tmp_path / "moe_tiny").unlink()
    (tmp_path / "moe_tiny").mkdir()  # such as a run's folder
    assert load_recipe("moe_tiny").model.num_layers == 4


def test_a_misspelled_recipe_names_the_nearest_and_all() -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("moe_7b_papre")
    (problem,) = caught.value.problems
    assert "the nearest recipe is moe_7b_paper, of dense_1b_paper, dense_1b_released" in problem
    assert problem.endswith(", ".join(recipe_names()))
    with pytest.raises(
        ConfigError, match=r"`moe_tny.yaml` cannot be read.*or one of dense_1b_paper"
    ):
        load_recipe("moe_tny.yaml")


def test_train_prints_a_recipe_from_an_empty_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megapoly", "train", "--config", "moe_tiny", "--print-config"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == ""
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "printed.yaml").write_text(result.stdout)
    printed, given = load_yaml(tmp_path / "printed.yaml"), load_recipe("moe_tiny")
    assert printed.model.vocab_size == 4096 and given.model.vocab_size is None
    assert printed.optimizer.lr_decay_iters == given.training.train_iters == 240
    assert printed.run_dir == given.run_dir


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_breaks_no_rule_where_its_data_is(path: Path, tmp_path: Path) -> None:
    config = load_yaml(path)
    if config.data.blend is not None:
        for suffix in (".bin", ".idx"):
            (tmp_path / f"tokens{suffix}").touch()
        (tmp_path / "tokenizer.json").touch()
        config.data.blend = [str(tmp_path / "tokens")]
        config.data.validation = {"valid": str(tmp_path / "tokens")}
        config.data.tokenizer = str(tmp_path)
    problems = find_problems(
        config,
        world_size=WORLD_SIZES.get(path.stem, 1),
        machine=Machine(cuda=path.stem in WORLD_SIZES),
        tokenizer_vocab_size=4096,
    )
    assert problems == []


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_says_what_it_is(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    comments = [line for line in lines[:4] if line.startswith("# ")]
    assert 1 <= len(comments) <= 3
    assert f"run_dir: runs/{path.stem}" in lines
    assert not any("tools/" in line for line in lines)


@pytest.mark.parametrize("name", sorted(WORLD_SIZES))
def test_missing_data_is_one_error_an_option(name: str) -> None:
    problems = find_problems(
        load_recipe(name),
        world_size=WORLD_SIZES[name],
        machine=Machine(cuda=True, transformer_engine=True),
    )
    options = ("data.blend", "data.validation", "data.tokenizer")
    assert len(problems) == 3
    for option, problem in zip(options, problems, strict=True):
        assert option in problem


def test_paper_numbers_of_dense_model() -> None:
    paper, released = load_recipe("dense_1b_paper"), load_recipe("dense_1b_released")
    assert lr_warmup_iters(paper) == lr_warmup_iters(released) == 2365
    assert train_iters(paper) == 953_675  # 250B tokens at 262,144 a step, rounded up
    assert train_iters(released) == lr_decay_iters(released) == 381_469  # the script rounds down
    assert num_microbatches(paper, 32) == 1
    assert (paper.optimizer.min_lr, released.optimizer.min_lr) == (1.5e-5, 3e-5)
    assert (paper.model.hidden_dropout, released.model.hidden_dropout) == (0.0, 0.1)


def test_paper_numbers_of_mixture_of_experts() -> None:
    paper, released = load_recipe("moe_7b_paper"), load_recipe("moe_7b_released")
    assert lr_warmup_iters(paper) == lr_warmup_iters(released) == 2500
    assert train_iters(paper) == train_iters(released) == lr_decay_iters(paper) == 47_684
    assert lr_decay_iters(released) == 1_192_093  # 5e12 tokens
    assert num_microbatches(paper, 64) == 8
    assert paper.optimizer.min_lr == pytest.approx(0.1 * paper.optimizer.lr)
    assert paper.model.qk_norm == "full"
    assert num_microbatches(released, 64) == 4


# Where the release is not the paper: its value.
RELEASED = {
    "dense_1b": {
        "model.activation": "polyrelu",
        "model.hidden_dropout": 0.1,
        "model.attention_dropout": 0.1,
        "optimizer.min_lr": 3e-5,
        "training.train_iters": 381_469,
        "training.train_tokens": None,
    },
    "moe_7b": {
        "optimizer.lr_warmup_init": 4e-5,
        "optimizer.lr_warmup_tokens": 2_500 * 1024 * 4096,
        "optimizer.lr_decay_tokens": 5_000_000_000_000,
        "optimizer.decay_norms": True,
        "training.micro_batch_size": 4,
    },
}


@pytest.mark.parametrize("name", RELEASED)
def test_paper_and_release_differ_only_where_they_should(name: str) -> None:
    paper, released = load_recipe(f"{name}_paper"), load_recipe(f"{name}_released")
    different = {
        key: value_of(released, key)
        for key in OPTIONS
        if key != "run_dir" and value_of(released, key) != value_of(paper, key)
    }
    assert different == RELEASED[name]


def test_tiny_recipes_take_every_activation() -> None:
    from megapoly.activations.registry import ACTIVATIONS

    for name in ("moe_tiny", "dense_tiny"):
        for activation in ACTIVATIONS:
            words = ["--model.activation", activation, "--parallel.sequence_parallel", "true"]
            words += ["--parallel.tensor_model_parallel_size", "4"]
            arguments = parse(words, default_recipe=FOLDER / f"{name}.yaml", program="x")
            assert not find_problems(
                arguments.config,
                world_size=4,
                machine=CPU,
                tokenizer_vocab_size=4096,
            )
