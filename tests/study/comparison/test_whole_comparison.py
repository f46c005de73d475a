import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from megapoly.config import Config
from megapoly.errors import ConfigError, DataError
from megapoly.study.comparison.comparison import Comparison
from megapoly.study.comparison.jobs import JobRunner, TrialError, TrialJob
from megapoly.study.comparison.lock import sole_use
from megapoly.study.comparison.record import ComparisonRecord
from megapoly.study.comparison.trials import Variant

SWIGLU, POLYNORM = Variant("swiglu", None), Variant("polynorm", 3)
TRAINER = Path(__file__).parent / "trainer.py"


def comparison(
    output: Path, *, rates: tuple[float, ...], seeds: tuple[int, ...], margin: float = 0.0
) -> Comparison:
    base = Config()
    base.training.train_iters = 5
    return Comparison(
        base=base,
        variants=[SWIGLU, POLYNORM],
        rates=rates,
        seeds=seeds,
        margin=margin,
        output=output,
        launcher=[sys.executable, str(TRAINER)],
        at_once=2,
        environment={"OMP_NUM_THREADS": "3"},
    )


def run(compared: Comparison) -> tuple[dict[Variant, float], str, ComparisonRecord]:
    console = Console(file=io.StringIO(), width=200)
    record = ComparisonRecord.of(compared.output, command="compare", config=["a.yaml"])
    chosen = compared.run(record, console)
    assert isinstance(console.file, io.StringIO)
    return chosen, console.file.getvalue(), record


def test_each_activation_takes_its_best_rate_to_the_other_seeds(tmp_path: Path) -> None:
    compared = comparison(tmp_path, rates=(2e-3, 4e-3), seeds=(1, 2))
    chosen, shown, _ = run(compared)
    assert chosen == {SWIGLU: 2e-3, POLYNORM: 4e-3}
    folders = {path.parent.name for path in tmp_path.glob("*/metrics.jsonl")}
    assert folders == {
        "swiglu.lr_0.002.seed_1",
        "swiglu.lr_0.004.seed_1",
        "swiglu.lr_0.002.seed_2",
        "polynorm.lr_0.002.seed_1",
        "polynorm.lr_0.004.seed_1",
        "polynorm.lr_0.004.seed_2",
    }
    assert "polynorm.lr_0.002.seed_1: loss 5.0100, validation loss 5.0100, 0:00:0" in shown
    assert "(6 of 6, about 0:00:00 left)" in shown
    assert (tmp_path / "swiglu.lr_0.002.seed_2/calls").read_text() == "3\n"
    written = json.loads((tmp_path / "comparison.json").read_text())
    assert written["commands"] == ["compare"]
    assert {name: trial["phase"] for name, trial in written["trials"].items()} == {
        name: "seeds" if "seed_2" in name else "rates" for name in folders
    }
    assert all(trial["wall_time_s"] > 0 for trial in written["trials"].values())
    assert written["chosen"] == {
        "swiglu": "swiglu.lr_0.002.seed_1",
        "polynorm": "polynorm.lr_0.004.seed_1",
    }
    assert written["hardware"]["cores"] >= 1

    again, shown, record = run(compared)
    assert again == chosen
    assert shown.count(": complete") == 6
    assert "started" not in shown
    assert record.trials == written["trials"]
    assert {path.read_text() for path in tmp_path.glob("*/calls")} == {"3\n"}, "one call each"


def test_more_seeds_go_on_from_what_is_there(tmp_path: Path) -> None:
    run(comparison(tmp_path, rates=(2e-3,), seeds=(1,)))
    _, shown, _ = run(comparison(tmp_path, rates=(2e-3,), seeds=(1, 2)))
    assert shown.count(": complete") == 2
    assert shown.count(": started") == 2
    trials = json.loads((tmp_path / "comparison.json").read_text())["trials"]
    assert {trial["phase"] for trial in trials.values()} == {"seeds"}


def test_a_stopped_run_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STOP_FIRST", "swiglu.lr_0.002.seed_1")
    compared = comparison(tmp_path, rates=(2e-3,), seeds=(1,))
    with pytest.raises(TrialError, match=r"1 of 2 trials have failed"):
        run(compared)
    name, path = "swiglu.lr_0.002.seed_1", tmp_path / "comparison.json"
    written = json.loads(path.read_text())
    assert 0 < written["trials"][name]["wall_time_s"] < 1000
    written["trials"][name]["wall_time_s"] = 1000.0
    path.write_text(json.dumps(written))
    _, shown, record = run(compared)
    assert shown.count(": complete") == shown.count(": started") == 1
    assert (tmp_path / name / "calls").read_text() == "3\n3\n"
    assert (tmp_path / "polynorm.lr_0.002.seed_1/calls").read_text() == "3\n"
    assert record.trials[name]["wall_time_s"] > 1000, "of both calls together"
    shutil.rmtree(tmp_path / name)
    monkeypatch.delenv("STOP_FIRST")
    _, _, record = run(compared)
    assert 0 < record.trials[name]["wall_time_s"] < 1000, "of the call that made the folder"


def test_a_failed_run_is_told_with_its_last_lines_and_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAIL", "swiglu.lr_0.002.seed_1")
    compared = comparison(tmp_path, rates=(2e-3, 4e-3), seeds=(1,))
    console = Console(file=io.StringIO(), width=200)
    record = ComparisonRecord.of(tmp_path, command="", config=[])
    with pytest.raises(
        TrialError, match=r"1 of 4 trials have failed: swiglu\.lr_0\.002\.seed_1 \("
    ):
        compared.run(record, console)
    assert isinstance(console.file, io.StringIO)
    assert "seed_1.log\nout of memory\n" in console.file.getvalue()
    assert len(list(tmp_path.glob("*/metrics.jsonl"))) == 3


def test_a_rate_at_which_the_loss_is_not_finite_loses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIVERGE", "0.004")
    compared = comparison(tmp_path, rates=(1e-3, 4e-3), seeds=(1, 2))
    chosen, shown, _ = run(compared)
    assert chosen == {SWIGLU: 1e-3, POLYNORM: 1e-3}, "polynorm would be best at 0.004"
    assert "polynorm.lr_0.004.seed_1: diverged after step 2 of 5" in shown
    written = json.loads((tmp_path / "comparison.json").read_text())
    assert {name for name, trial in written["trials"].items() if "diverged" in trial} == {
        "swiglu.lr_0.004.seed_1",
        "polynorm.lr_0.004.seed_1",
    }
    run(compared)
    assert (tmp_path / "polynorm.lr_0.004.seed_1/calls").read_text() == "3\n", "not tried again"
    shutil.rmtree(tmp_path / "polynorm.lr_0.004.seed_1")
    monkeypatch.delenv("DIVERGE")
    chosen, _, record = run(compared)
    assert chosen == {SWIGLU: 1e-3, POLYNORM: 4e-3}, "a deleted folder is"
    assert "diverged" not in record.trials["polynorm.lr_0.004.seed_1"]


def test_a_rate_whose_validation_loss_is_nan_loses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NAN_VALIDATION", "0.002")
    chosen, _, _ = run(comparison(tmp_path, rates=(2e-3, 4e-3), seeds=(1,)))
    assert chosen == {SWIGLU: 4e-3, POLYNORM: 4e-3}
    chosen, _, record = run(comparison(tmp_path / "other", rates=(2e-3, 2e-3), seeds=(1,)))
    assert chosen == record.chosen == {}


def test_who_diverges_at_the_only_rate_or_with_a_later_seed_has_no_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIVERGE", "0.002")
    chosen, _, record = run(comparison(tmp_path / "rate", rates=(2e-3,), seeds=(1, 2)))
    assert chosen == record.chosen == {}
    assert not list((tmp_path / "rate").glob("*.seed_2")), "no seed is tried where one is lost"
    monkeypatch.setenv("DIVERGE", "swiglu.seed_2")
    for _ in range(2):  # the second call knows it from the first
        chosen, _, _ = run(comparison(tmp_path / "seed", rates=(2e-3, 4e-3), seeds=(1, 2, 3)))
        assert chosen == {POLYNORM: 4e-3}
    assert len(list((tmp_path / "seed").glob("*.seed_3"))) == 2


def test_rates_that_the_first_seed_cannot_tell_apart_get_all_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The losses of swiglu are 1 + 0.01 a seed apart at neighbouring rates, best at 2e-3."""
    rates, seeds = (1e-3, 2e-3, 4e-3), (1, 2)
    run(comparison(tmp_path / "near", rates=rates, seeds=seeds, margin=0.99))
    assert len(list((tmp_path / "near").glob("*.seed_2"))) == 2
    chosen, shown, _ = run(comparison(tmp_path, rates=rates, seeds=seeds, margin=1.01))
    assert chosen == {SWIGLU: 2e-3, POLYNORM: 4e-3}
    later = {path.name for path in tmp_path.glob("*.seed_2")}
    assert later == {
        *(f"swiglu.lr_{lr}.seed_2" for lr in ("0.001", "0.002", "0.004")),
        *(f"polynorm.lr_{lr}.seed_2" for lr in ("0.002", "0.004")),
    }
    assert "(11 of 11, about 0:00:00 left)" in shown
    shutil.rmtree(tmp_path / "swiglu.lr_0.002.seed_2")
    monkeypatch.setenv("DIVERGE", "0.002")
    chosen, _, _ = run(comparison(tmp_path, rates=rates, seeds=seeds, margin=1.01))
    assert chosen[SWIGLU] == 1e-3, "its best with the first seed diverges with the second"


def test_commands_and_choices_of_a_folder_add_up(tmp_path: Path) -> None:
    for variant, command in ((SWIGLU, "first"), (POLYNORM, "second"), (SWIGLU, "first")):
        compared = replace(comparison(tmp_path, rates=(2e-3,), seeds=(1,)), variants=[variant])
        record = ComparisonRecord.of(tmp_path, command=command, config=[])
        compared.run(record, Console(file=io.StringIO()))
    assert record.commands == ["second", "first"]
    assert set(record.chosen) == {"swiglu", "polynorm"}


def test_a_folder_that_was_moved_goes_on(tmp_path: Path) -> None:
    run(comparison(tmp_path / "here", rates=(2e-3,), seeds=(1,)))
    (tmp_path / "here").rename(tmp_path / "there")
    _, shown, _ = run(comparison(tmp_path / "there", rates=(2e-3,), seeds=(1,)))
    assert shown.count(": complete") == 2


def test_times_of_trials_are_written_as_they_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = comparison(tmp_path, rates=(2e-3,), seeds=(1,))
    record = ComparisonRecord.of(tmp_path, command="", config=[])
    written = []
    monkeypatch.setattr(ComparisonRecord, "write", lambda self: written.append(dict(self.trials)))
    compared.run(record, Console(file=io.StringIO()))
    assert [len(trials) for trials in written] == [0, 1, 2, 2, 2]


def test_one_comparison_at_a_time_works_in_a_folder(tmp_path: Path) -> None:
    # What holds the lock is a job that outlives the process that took it.
    with sole_use(tmp_path) as lock:
        assert lock is not None
        job = subprocess.Popen(["sleep", "60"], pass_fds=[lock])
    try:
        with pytest.raises(ConfigError, match="another comparison, or runs of one that was killed"):
            run(comparison(tmp_path, rates=(2e-3,), seeds=(1,)))
        assert not list(tmp_path.glob("swiglu*"))
    finally:
        job.kill()
        job.wait()
    run(comparison(tmp_path, rates=(2e-3,), seeds=(1,)))


def test_jobs_hold_the_lock(tmp_path: Path) -> None:
    held = "import os, sys; sys.exit(0 if os.path.samestat(os.fstat(int(sys.argv[1])), "
    held += "os.stat(sys.argv[2])) else 1)"
    with sole_use(tmp_path) as lock:
        assert lock is not None
        command = [sys.executable, "-c", held, str(lock), str(tmp_path / ".lock")]
        job = TrialJob("job", command, tmp_path, tmp_path / "log", 5)
        runner = JobRunner(
            console := Console(file=io.StringIO()),
            at_once=1,
            total=1,
            on_end=lambda *_: None,
            inherited=[lock],
        )
        with pytest.raises(TrialError):
            runner.run([job])
    assert isinstance(console.file, io.StringIO)
    assert "job: ended before its last step" in console.file.getvalue(), "status 0: it has it open"


def test_a_damaged_record_is_refused(tmp_path: Path) -> None:
    (tmp_path / "comparison.json").write_text('{"wall_time_s": 3.0, "tri')
    with pytest.raises(DataError, match="delete it, and run the"):
        ComparisonRecord.of(tmp_path, command="", config=[])


def test_trials_of_another_configuration_are_refused_before_anything_runs(tmp_path: Path) -> None:
    run(comparison(tmp_path, rates=(2e-3,), seeds=(1,)))
    other = comparison(tmp_path, rates=(2e-3,), seeds=(1,))
    other.base.training.train_iters, other.base.data.tokenizer = 6, "t.json"
    with pytest.raises(ConfigError) as error:
        run(other)
    assert "`training.train_iters` 5 where 6 is requested" in str(error.value)
    assert "`data.tokenizer` None where t.json is requested" in str(error.value)
    assert (tmp_path / "swiglu.lr_0.002.seed_1/calls").read_text() == "3\n"


def test_a_later_seed_of_another_configuration_is_refused_before_anything_runs(
    tmp_path: Path,
) -> None:
    run(comparison(tmp_path, rates=(2e-3, 4e-3), seeds=(1, 2)))
    for path in tmp_path.glob("recipes/*seed_1.yaml"):
        path.unlink()
    other = comparison(tmp_path, rates=(2e-3, 4e-3), seeds=(3, 2))
    other.base.training.train_iters = 6
    with pytest.raises(ConfigError, match=r"swiglu\.lr_0\.002\.seed_2 is in `--output`"):
        run(other)
    assert not list(tmp_path.glob("*seed_3"))
