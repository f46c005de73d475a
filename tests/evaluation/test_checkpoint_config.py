"""What an evaluation takes from a checkpoint's configuration, and which options may be set."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from megapoly.config.options import OPTIONS
from megapoly.config.parsing import to_yaml
from megapoly.config.resolve import resolve
from megapoly.config.schema import Config
from megapoly.errors import CheckpointError, ConfigError
from megapoly.evaluation.checkpoint_config import EVALUATION_OPTIONS, configure_evaluation
from megapoly.platform.machine import CPU


@pytest.fixture
def saved() -> Config:
    """Of a run on many processes, on files that are not here."""
    config = Config(run_dir="elsewhere/run")
    config.model.num_moe_experts = 8
    config.parallel.tensor_model_parallel_size = 4
    config.parallel.expert_model_parallel_size = 8
    config.parallel.use_distributed_optimizer = True
    config.data.blend, config.data.validation = ["gone/train"], {"wiki": "gone/wiki"}
    config.optimizer.lr_warmup_iters = 10
    config.training = dataclasses.replace(
        config.training, train_iters=100, bf16=True, seq_length=128, eval_iters=7
    )
    config.checkpoint.load = "gone/iter_0000001"
    return resolve(config, tokenizer_vocab_size=4096, machine=CPU)


@pytest.fixture
def checkpoint(tmp_path: Path, saved: Config) -> Path:
    path = tmp_path / "moved" / "checkpoints" / "iter_0000100"
    path.mkdir(parents=True)
    (path / "run.json").write_text("{}")
    (path / "config.yaml").write_text(to_yaml(saved))
    return path


def problems(checkpoint: Path, *args: str, needs_validation: bool = False) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        configure_evaluation(checkpoint, args, needs_validation=needs_validation)
    return caught.value.problems


def test_model_and_batch_are_the_checkpoints_and_the_layout_is_not(
    checkpoint: Path, saved: Config
) -> None:
    config = configure_evaluation(checkpoint)
    assert config.model == saved.model
    for name in ("seq_length", "micro_batch_size", "global_batch_size", "bf16", "eval_iters"):
        assert getattr(config.training, name) == getattr(saved.training, name)
    assert config.parallel.tensor_model_parallel_size == 1
    assert config.parallel.expert_model_parallel_size == 1
    assert not config.parallel.use_distributed_optimizer
    assert config.data.blend is None and config.data.validation is None
    assert config.run_dir == str(checkpoint.parents[1])
    assert config.data.cache_dir == str(checkpoint.parents[1] / "cache")


def test_options_go_before_the_checkpoint(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    args = ["--parallel.tensor_model_parallel_size", "2", "--training.eval_iters=null"]
    config = configure_evaluation(checkpoint, args)
    assert config.parallel.tensor_model_parallel_size == 2 and config.parallel.sequence_parallel
    assert config.training.eval_iters is None


def test_wrong_options_are_reported_together(checkpoint: Path) -> None:
    args = ["--optimizer.lr", "1", "--parallel.tensor_model_parallel_size", "3"]
    unread, *broken = problems(checkpoint, *args)
    assert unread == ("`optimizer.lr` has no effect when a checkpoint is evaluated; leave it out")
    assert any("`parallel.tensor_model_parallel_size`" in problem for problem in broken)
    (unknown,) = problems(checkpoint, "--training.eval_iter", "3")
    assert "the nearest is `training.eval_iters`" in unknown
    (recipe,) = problems(checkpoint, "--config", "a.yaml")
    assert "`--config`" in recipe


def test_validation_sets_must_be_there_where_they_are_read(
    checkpoint: Path, saved: Config, tmp_path: Path
) -> None:
    (missing,) = problems(checkpoint, needs_validation=True)
    assert "`data.validation` `wiki`" in missing and "gone/wiki.bin" in missing
    (unread,) = problems(checkpoint, "--data.validation", "null")
    assert "without `--perplexity`" in unread
    saved.data.validation = None
    (checkpoint / "config.yaml").write_text(to_yaml(saved))
    (none,) = problems(checkpoint, needs_validation=True)
    assert "--data.validation '{wiki:" in none
    for ending in (".bin", ".idx"):
        (tmp_path / f"mine{ending}").touch()
    args = ["--data.validation", f"{{mine: {tmp_path}/mine}}"]
    config = configure_evaluation(checkpoint, args, needs_validation=True)
    assert config.data.validation == {"mine": f"{tmp_path}/mine"}


def test_incomplete_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no run.json"):
        configure_evaluation(tmp_path)


def test_options_of_evaluation_exist() -> None:
    assert set(EVALUATION_OPTIONS) <= set(OPTIONS)
