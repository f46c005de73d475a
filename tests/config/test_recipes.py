"""Every shipped recipe parses, and is right for the machines it was written for."""

from __future__ import annotations

from pathlib import Path

import pytest

from megapoly.config.parsing import load_yaml, parse
from megapoly.config.resolve import lr_decay_iters, lr_warmup_iters, num_microbatches, train_iters
from megapoly.config.rules import find_problems
from megapoly.config.schema import Config
from megapoly.platform.machine import CPU, Machine

FOLDER = Path(__file__).parents[2] / "examples" / "configs"
RECIPES = sorted(FOLDER.glob("*.yaml"))
WORLD_SIZES = {"moe_7b_paper": 64, "moe_7b_released": 64}
WORLD_SIZES |= {"dense_1b_paper": 32, "dense_1b_released": 32}


def recipe(name: str) -> Config:
    return load_yaml(FOLDER / f"{name}.yaml")


def test_all_recipes_are_here() -> None:
    names = {path.stem for path in RECIPES}
    assert {"moe_tiny", "dense_tiny", *WORLD_SIZES} <= names


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


@pytest.mark.parametrize("name", sorted(WORLD_SIZES))
def test_missing_data_is_one_error_an_option(name: str) -> None:
    problems = find_problems(
        recipe(name),
        world_size=WORLD_SIZES[name],
        machine=Machine(cuda=True, transformer_engine=True),
    )
    options = ("data.blend", "data.validation", "data.tokenizer")
    assert len(problems) == 3
    for option, problem in zip(options, problems, strict=True):
        assert option in problem


def test_paper_numbers_of_dense_model() -> None:
    paper, released = recipe("dense_1b_paper"), recipe("dense_1b_released")
    assert lr_warmup_iters(paper) == lr_warmup_iters(released) == 2365
    assert train_iters(paper) == 953_675  # 250B tokens at 262,144 a step, rounded up
    assert train_iters(released) == 381_470
    assert num_microbatches(paper, 32) == 1
    assert (paper.optimizer.min_lr, released.optimizer.min_lr) == (1.5e-5, 3e-5)
    assert (paper.model.hidden_dropout, released.model.hidden_dropout) == (0.0, 0.1)


def test_paper_numbers_of_mixture_of_experts() -> None:
    paper, released = recipe("moe_7b_paper"), recipe("moe_7b_released")
    assert lr_warmup_iters(paper) == lr_warmup_iters(released) == 2500
    assert train_iters(paper) == train_iters(released) == lr_decay_iters(paper) == 47_684
    assert lr_decay_iters(released) == 1_192_093  # 5e12 tokens
    assert num_microbatches(paper, 64) == 8
    assert paper.optimizer.min_lr == pytest.approx(0.1 * paper.optimizer.lr)
    assert paper.model.qk_norm == "full"


@pytest.mark.parametrize(("name", "one_difference"), [("dense_1b", 5), ("moe_7b", 2)])
def test_paper_and_release_differ_only_where_they_should(name: str, one_difference: int) -> None:
    paper = (FOLDER / f"{name}_paper.yaml").read_text(encoding="utf-8").splitlines()
    released = (FOLDER / f"{name}_released.yaml").read_text(encoding="utf-8").splitlines()
    added = [line for line in released if line not in paper and not line.startswith("#")]
    assert len(added) == one_difference


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
