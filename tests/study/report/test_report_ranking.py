"""Rankings on shared seeds, and the sentences that are made from them."""

import json
import math
from pathlib import Path

import pytest
from made_runs import write_run

from megapoly.study.report.answer import answer
from megapoly.study.report.content import read
from megapoly.study.report.grouping import group_runs
from megapoly.study.report.groups import RunGroup
from megapoly.study.report.ranking import ranking_of, rankings, unranked
from megapoly.study.report.ranking_tables import ranking_tables
from megapoly.study.report.runs import read_run
from megapoly.study.report.tables import domains, losses


def group_of(folder: Path, ends: dict[str, dict[int, float]]) -> RunGroup:
    """Return the group of runs with these final losses by activation and seed."""
    runs = [
        read_run(
            write_run(
                folder / f"{activation}.{seed}",
                [3.0],
                activation=activation,
                seed=seed,
                evaluations={1: {"a": loss}},
            )
        )
        for activation, seeds in ends.items()
        for seed, loss in seeds.items()
    ]
    (found,) = group_runs(runs, "swiglu")
    return found


def plain(sentences: list[str]) -> list[str]:
    return [sentence.replace("\u00a0", " ") for sentence in sentences]


# PolyReLUNorm has the lower mean over its own seeds, PolyReLU on the seeds that both have.
REVERSED = {
    "swiglu": {1: 4.10, 2: 4.13, 3: 4.12, 4: 4.20, 5: 4.19},
    "polyrelu": {1: 4.00, 2: 4.03, 3: 4.02, 4: 4.13, 5: 4.14},
    "polyrelunorm": {1: 4.02, 2: 4.04, 3: 4.03},
}


def test_lines_are_ranked_on_the_seeds_that_they_share(tmp_path: Path) -> None:
    group = group_of(tmp_path, REVERSED)
    first, second = rankings(group)
    assert first.seed_names == "seeds 1 to 5"
    assert [e.label for e in first.entries] == ["PolyReLU", "SwiGLU"]
    assert second.seed_names == "seeds 1 to 3"
    assert [e.label for e in second.entries] == ["PolyReLU", "PolyReLUNorm", "SwiGLU"]
    assert second.fit.means == pytest.approx([12.05 / 3, 12.09 / 3, 12.35 / 3])
    by_label = {entry.label: entry for entry in group.entries}
    pair = by_label["PolyReLU"], by_label["SwiGLU"]
    assert ranking_of([first, second], *pair) is first
    assert first.difference(*pair) == pytest.approx((20.32 - 20.74) / 5)
    assert ranking_of([first, second], pair[0], by_label["PolyReLUNorm"]) is second


def test_bold_is_that_of_the_ranking(tmp_path: Path) -> None:
    group = group_of(tmp_path, REVERSED)
    first, second = ranking_tables(group)
    assert (first.title, second.title) == ("Ranking on seeds 1 to 5", "Ranking on seeds 1 to 3")
    assert [(label, row[0].text, row[0].best) for label, row in second.rows] == [
        ("PolyReLU", "4.0167", True),
        ("PolyReLUNorm", "4.0300", False),
        ("SwiGLU", "4.1167", False),
    ]
    for table in (losses(group), domains(group)):
        column = table.columns.index("validation loss" if "seeds" in table.columns else "a") - 1
        bold = [label for label, row in table.rows if row[column].best]
        # PolyReLUNorm, which has the lowest mean over its own seeds, has not the first's seeds.
        assert bold == ["PolyReLU"]


def test_lines_that_cannot_be_distinguished_are_bold_together(tmp_path: Path) -> None:
    ends = {
        "relu": {1: 2.9, 2: 3.0, 3: 3.1},
        "swiglu": {1: 2.03, 2: 2.0, 3: 2.01},
        "polynorm": {1: 2.0, 2: 2.02, 3: 2.0},
    }
    group = group_of(tmp_path, ends)
    (ranking,) = rankings(group)
    assert [e.label for e in ranking.leaders] == ["PolyNorm", "SwiGLU"]
    assert [row[0].best for _, row in ranking_tables(group)[0].rows] == [True, True, False]
    first = plain(answer(group))[0]
    limit = f"{ranking.fit.half_interval:.3f}"
    assert first == (
        "On seeds 1 to 3, PolyNorm has the lowest validation loss, 2.007; it ends below ReLU by "
        f"0.993 (± {limit}, simultaneous 95 %), but cannot be distinguished from SwiGLU (2.013)."
    )


def test_without_a_distinction_nothing_is_bold(tmp_path: Path) -> None:
    ends = {"swiglu": {1: 2.0, 2: 2.1}, "polynorm": {1: 2.1, 2: 1.9}}
    group = group_of(tmp_path, ends)
    (ranking,) = rankings(group)
    assert ranking.bold == []
    tables = [*ranking_tables(group), losses(group), domains(group)]
    assert not any(cell.best for table in tables for _, row in table.rows for cell in row)
    assert "None is bold: no two lines can be distinguished." in tables[0].notes
    # Differences +0.1 and -0.2: t with one degree of freedom is 12.7.
    half = 12.7062 * 0.15
    assert plain(answer(group))[0] == (
        "On seeds 1 and 2, no two of PolyNorm 2.000 and SwiGLU 2.050 can be distinguished by "
        f"validation loss: the largest difference is 0.050, and it must exceed {half:.3f}."
    )


def test_seeds_that_only_some_lines_have(tmp_path: Path) -> None:
    """Each pair has its own two seeds; the third line shares one with each of them."""
    ends = {
        "swiglu": {1: 2.0, 2: 2.1, 3: 2.2},
        "relu": {1: 2.3, 2: 2.4, 4: 2.5},
        "polynorm": {3: 1.9, 4: 1.9, 5: 1.9},
    }
    group = group_of(tmp_path, ends)
    found = rankings(group)
    assert [(r.seeds, [e.label for e in r.entries]) for r in found] == [
        (["1", "2"], ["SwiGLU", "ReLU"])
    ]
    assert unranked(group, found) == {"PolyNorm": "no other line shares two of its seeds"}
    assert "Not ranked (no other line shares two of its seeds): PolyNorm." in answer(group)


def test_a_run_without_a_finite_loss_takes_its_line_out(tmp_path: Path) -> None:
    ends = {
        "swiglu": {1: 2.0, 2: 2.0},
        "relu": {1: 2.2, 2: 2.2},
        "polynorm": {1: 1.9, 2: math.nan},
    }
    group = group_of(tmp_path, ends)
    (ranking,) = rankings(group)
    assert [e.label for e in ranking.entries] == ["SwiGLU", "ReLU"]
    row = dict(losses(group).rows)["PolyNorm"]
    assert [row[i].text for i in (1, 3, 4)] == ["–"] * 3
    assert "Not ranked (no finite result with seed 2): PolyNorm." in answer(group)


def test_a_diverged_run_takes_its_line_out(tmp_path: Path) -> None:
    for activation in ("swiglu", "relu", "polynorm"):
        for seed in (1, 2, 3):
            lost = (activation, seed) == ("polynorm", 3)
            evaluations = {2: {"a": 2.0 + seed / 10 + (activation == "relu")}}
            write_run(
                tmp_path / f"{activation}.{seed}",
                [3.0] if lost else [3.0, 2.0],
                activation=activation,
                seed=seed,
                steps=2,
                evaluations=evaluations,
                source=None,
            )
    trials = {"polynorm.3": {"wall_time_s": 1.0, "phase": "seeds", "diverged": True}}
    comparison = {"commands": ["compare"], "trials": trials, "chosen": {}}
    (tmp_path / "comparison.json").write_text(json.dumps(comparison))
    (group,) = group_runs(read([tmp_path]).runs, "swiglu")
    (ranking,) = rankings(group)
    assert [e.label for e in ranking.entries] == ["SwiGLU", "ReLU"]
    assert "Not ranked (no finite result with seed 3): PolyNorm." in answer(group)


def test_one_seed_calls_no_line_the_best(tmp_path: Path) -> None:
    group = group_of(tmp_path, {"swiglu": {7: 2.0}, "polynorm": {7: 1.9}})
    assert rankings(group) == [] and ranking_tables(group) == []
    assert answer(group) == [
        "Final validation losses with seed 7: PolyNorm 1.900, SwiGLU 2.000.",
        "No two lines share two seeds with finite losses, so how much results vary is unknown, and "
        "no line is called the best.",
        "Not tuned: every line was trained at one rate (0.001), which favours the line that it "
        "suits best.",
    ]
    assert not any(cell.best for _, row in losses(group).rows for cell in row)


def test_correlation_says_what_pairing_is_worth(tmp_path: Path) -> None:
    # Seeds differ by 0.4, lines of one seed by 0.1 with hardly any noise, and the reverse.
    alike = {"swiglu": {1: 2.0, 2: 2.4, 3: 2.8}, "polynorm": {1: 1.9, 2: 2.31, 3: 2.7}}
    said = plain(answer(group_of(tmp_path / "alike", alike)))[1]
    correlation = rankings(group_of(tmp_path / "again", alike))[0].fit.correlation
    assert correlation is not None and correlation > 0.99
    assert f"{math.sqrt(1 - correlation):.2f} of what it is without." in said
    apart = {"swiglu": {1: 2.0, 2: 2.4}, "polynorm": {1: 2.3, 2: 1.9}}
    said = plain(answer(group_of(tmp_path / "apart", apart)))[1]
    assert "over seeds 1 and 2. At zero or below, pairing by seed narrows no difference." in said
