import json
import subprocess
import sys
from pathlib import Path

import pytest

from megapoly.commands.compare import main
from megapoly.testing.jobs import shared_cache

ROOT = Path(__file__).parents[2]
RECIPE = "examples/configs/dense_miniature.yaml"


def compare(*arguments: str, status: int = 0) -> str:
    """Run the command; return its output, or its errors if it must fail."""
    done = subprocess.run(
        [sys.executable, "tools/compare_activations.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stderr if status else done.stdout


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two activations trained for three steps."""
    output = tmp_path_factory.mktemp("compared")
    arguments = (
        f"--config {RECIPE} --output {output} --activations swiglu polyrelu:2 --jobs 2 --seeds 5"
    )
    sizes = "--model.num_layers 1 --training.train_iters 3 --training.eval_interval 2 "
    shown = compare(
        *arguments.split(),
        *sizes.split(),
        *f"--training.eval_iters 1 --data.cache_dir {shared_cache().name}".split(),
        *"--model.activation_backend reference".split(),
    )
    assert "parameters: 574,656 to 574,659" in shown
    assert "tokens: 3,072 each, 3 steps of 1,024" in shown
    assert "Losses, like Table 1" in shown
    return output


def test_runs_are_trained_on_the_same_data_at_the_seed(compared: Path) -> None:
    names = ["swiglu.lr_0.004.seed_5", "polyrelu_order_2.lr_0.004.seed_5"]
    data = []
    for name in names:
        lines = [
            json.loads(x) for x in (compared / name / "metrics.jsonl").read_text().splitlines()
        ]
        assert [line["consumed_tokens"] for line in lines] == [1024, 2048, 3072]
        assert [("val/books/loss" in line) for line in lines] == [False, True, True]
        saved = compared / name / "checkpoints/iter_0000003"
        data.append(json.loads((saved / "run.json").read_text())["data"])
        assert data[-1]["seed"] == 5
    assert data[0] == data[1]
    record = json.loads((compared / "comparison.json").read_text())
    assert set(record["trials"]) == set(names)
    assert record["chosen"] == {"swiglu": names[0], "polyrelu_order_2": names[1]}
    (command,) = record["commands"]
    assert command.startswith(f"megapoly compare --config {RECIPE}")


def test_dry_run_lists_the_runs_and_starts_none(tmp_path: Path) -> None:
    arguments = (
        f"--config {RECIPE} --output {tmp_path / 'out'} --activations gelu polynorm --dry-run"
    )
    shown = compare(*arguments.split(), "--orders", "2", "3", "--learning-rates", "1e-3", "2e-3")
    assert shown.splitlines()[3:] == [
        "gelu.lr_0.001.seed_1",
        "polynorm_order_2.lr_0.001.seed_1",
        "polynorm.lr_0.001.seed_1",
        "gelu.lr_0.002.seed_1",
        "polynorm_order_2.lr_0.002.seed_1",
        "polynorm.lr_0.002.seed_1",
    ]
    mixed = compare(*arguments.split(), "--model.activation_eps", "1e-3")
    assert "model.activation_eps 0.001: polynorm alone; the others do not have it" in mixed
    near = compare(
        *arguments.split(), *"--learning-rates 1e-3 2e-3 --seeds 1 2 --margin 0.05".split()
    )
    assert near.splitlines()[-1] == "polynorm.lr_(best, within 0.05).seed_2"
    assert not (tmp_path / "out").exists()


def test_what_a_run_would_refuse_is_an_error_before_the_first(tmp_path: Path) -> None:
    arguments = f"--config {RECIPE} --output {tmp_path / 'out'} --activations gelu polynorm"
    said = compare(*arguments.split(), "--training.global_batch_size", "6", status=2)
    assert "`training.global_batch_size` (6) must be divisible by" in said
    assert "The configuration has 1 problem" in said
    assert not (tmp_path / "out").exists()


LARGE = "--config examples/configs/dense_1b_paper.yaml --activations swiglu polynorm"


def test_a_comparison_for_a_cluster_is_checked_where_its_data_is_not(tmp_path: Path) -> None:
    arguments = [*LARGE.split(), "--output", str(tmp_path / "out"), "--launcher", "sh run.sh"]
    shown = compare(*arguments, "--dry-run")
    assert "tokens: 250,000,179,200 each, 953675 steps of 262,144" in shown
    said = compare(*arguments, "--training.train_tokens", "null", "--optimizer.lr", "0", status=2)
    assert "`optimizer.lr` (0.0) must be above 0" in said
    assert "`training.train_tokens`" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--optimizer.lr 0", "`optimizer.lr` (0.0) must be above 0"),
        ("--launcher nosuch-launcher", "`--launcher` (nosuch-launcher) must begin with a program"),
        ("--launcher 'a", "No closing quotation"),
        ("--seeds 1 4294967296", "--seeds: 4294967296 must be a whole number, 0 to 4294967295"),
        ("--orders 2", "`--orders` (2) has no effect"),
        (
            "--model.activation_eps 1e-3",
            "has no effect with any of the compared activations (gelu)",
        ),
        ("--tasks piqa --task-data absent", "`training.eval_tasks_data` (absent) is not a folder"),
        ("--training.seed=3", "--training.seed is set by --seeds"),
        ("--learning-rates 1e-3 --optimizer.lr 2e-3", "--optimizer.lr is set by --learning-rates"),
        ("--task-limit 3", "--task-data and --task-limit are for --tasks"),
        ("--launcher sh --processes 2", "--nproc-per-node is for runs on this machine"),
        ("--seeds 2 1 2", "--seeds: each must be given once, not 2 1 2"),
        ("--learning-rates 0.001 1e-3", "--learning-rates: each must be given once, not 0.001"),
        ("--margin 0.1 --seeds 1 2", "--margin is for several --learning-rates and --seeds"),
        ("--modle.num_layers 3", "the nearest is `model.num_layers`"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_the_reason(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: str,
    message: str,
) -> None:
    monkeypatch.chdir(ROOT)
    given = (
        f"--config {RECIPE} --output {tmp_path / 'out'} --activations gelu --dry-run {arguments}"
    )
    try:
        status = main(given.split())
    except SystemExit as end:  # of argparse
        status = end.code
    assert status == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
