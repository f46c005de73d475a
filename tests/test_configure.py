from __future__ import annotations

from pathlib import Path

import pytest

from megapoly.config.parsing import load_yaml
from megapoly.config.schema import Config
from megapoly.errors import ConfigError
from megapoly.pretrain import configure

RECIPE = Path(__file__).parents[1] / "examples" / "configs" / "moe_tiny.yaml"


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)


def run(*args: str) -> Config:
    argv = ["--training.device", "cpu", *args]
    return configure(argv, default_recipe=RECIPE, program="megapoly train")


def printed(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        run("--print_config", *args)
    assert stopped.value.code == 0
    return capsys.readouterr().out


def test_result_is_resolved_with_the_builtin_tokenizer() -> None:
    config = run("--training.train_iters", "50")
    assert config.model.vocab_size == 4096
    assert config.optimizer.lr_decay_iters == 50
    assert config.model.transformer_engine is False


def test_printed_configuration_is_the_one_that_runs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    args = ["--model.qk_norm", "head", "--optimizer.lr=3e-3"]
    path = tmp_path / "printed.yaml"
    path.write_text(printed(capsys, *args), encoding="utf-8")
    assert load_yaml(path) == run(*args) == run("--config", str(path))
    assert printed(capsys, "--config", str(path)) == path.read_text(encoding="utf-8")


def test_only_rank_0_prints(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert printed(capsys)
    monkeypatch.setenv("RANK", "1")
    assert printed(capsys) == ""


def test_size_of_the_job_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    args = ["--parallel.tensor_model_parallel_size", "2"]
    with pytest.raises(ConfigError, match=r"number of processes \(1\)"):
        run(*args)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert run(*args).parallel.sequence_parallel is True


def test_broken_rules_are_not_printed_as_configuration() -> None:
    with pytest.raises(ConfigError, match=r"absent\.json"):
        run("--print_config", "--data.tokenizer", "absent.json")
