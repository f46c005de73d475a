import json
import math
import statistics

import pytest
from made_runs import write_run

from megapoly.study.figure_style import MUTED
from megapoly.study.report import results
from megapoly.study.report.answer import answer
from megapoly.study.report.content import read
from megapoly.study.report.end_figures import final_losses
from megapoly.study.report.grouping import group_runs
from megapoly.study.report.loss_figures import Curves, curves
from megapoly.study.report.run_tables import learning_rates
from megapoly.study.report.runs import read_run
from megapoly.study.report.tables import domains, losses, tokens_to_reach

# Validation loss of domains a and b halfway and at the end, by activation and seed.
ENDS = {
    "swiglu": {1: (4.0, 3.0), 2: (4.2, 3.2), 3: (4.4, 3.1)},
    "gelu": {1: (4.1, 3.1), 2: (4.1, 3.15), 3: (4.3, 3.3)},
    "polynorm": {1: (3.5, 2.8), 2: (3.6, 3.1), 3: (3.1, 2.9)},
}


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    runs = []
    for activation, seeds in ENDS.items():
        for seed, (half, end) in seeds.items():
            evaluations = {
                step: {"a": mean - 0.5, "b": mean + 0.5} for step, mean in ((20, half), (40, end))
            }
            training = [end + 2.0] * 20 + [end + 1.0] * 18 + [end + 0.2, end + 0.4]
            run = write_run(
                folder / f"{activation}.{seed}",
                training,
                activation=activation,
                seed=seed,
                evaluations=evaluations,
            )
            runs.append(read_run(run))
    (found,) = group_runs(runs, "swiglu")
    return found


def cells(table, label):
    row = dict(table.rows)[label]
    return {column: cell for column, cell in zip(table.columns[1:], row, strict=True)}


def test_losses_with_their_spread(group):
    row = cells(losses(group), "PolyNorm")
    ends = [2.8, 3.1, 2.9]
    assert row["training loss"].text == f"{statistics.mean(ends) + 0.3:.3f}"
    assert row["validation loss"].text == f"{statistics.mean(ends):.3f}"
    assert row["validation loss"].spread == f"± {statistics.stdev(ends):.3f}"
    assert row["perplexity"].text == f"{statistics.mean(map(math.exp, ends)):.2f}"
    assert row["validation loss"].best
    assert row["paper: training loss"].text == "2.172"


def test_difference_to_the_reference_is_paired(group):
    row = cells(losses(group), "GELU")
    gaps = [0.1, -0.05, 0.2]
    assert row["minus SwiGLU"].text == f"{statistics.mean(gaps):+.4f}"
    assert row["minus SwiGLU"].spread == f"± {statistics.stdev(gaps) / math.sqrt(3):.4f}"
    assert row["lower in"].text == "1 of 3"


def test_perplexity_by_domain(group):
    row = cells(domains(group), "SwiGLU")
    assert row["b"].text == f"{statistics.mean(math.exp(x + 0.5) for x in (3.0, 3.2, 3.1)):.2f}"
    assert row["b"].below == "3.600"


def test_tokens_to_reach(group):
    row = cells(tokens_to_reach(group, group.reference), "PolyNorm")
    # Halfway and on: 0.5 + 0.5 (3.5 - 3.0) / 0.7, (3.6 - 3.2) / 0.5; (3.1 - 3.1): at once.
    shares = [0.5 + 0.5 * 0.5 / 0.7, 0.5 + 0.5 * 0.4 / 0.5, 0.5]
    assert row["by validation loss"].text == f"{statistics.mean(shares):.2f}"
    assert row["by validation loss"].spread == f"± {statistics.stdev(shares):.2f}"
    row = cells(tokens_to_reach(group, group.reference), "GELU")
    assert row["by validation loss"].below == "1 of 3 seeds"


def test_not_reached(group):
    by_label = {entry.label: entry for entry in group.entries}
    found = results.reach(by_label["SwiGLU"], by_label["PolyNorm"], validation=True)
    assert (found.shares, found.seeds, found.spread) == ({}, 3, None)


def test_a_run_that_ends_above_has_not_reached_it(tmp_path):
    ends = {"swiglu": (4.0, 3.0), "gelu": (2.9, 3.1)}
    runs = []
    for activation, (half, end) in ends.items():
        options = {"activation": activation, "evaluations": {1: {"a": half}, 2: {"a": end}}}
        runs.append(read_run(write_run(tmp_path / activation, [3.0, 3.0], **options)))
    (found,) = group_runs(runs, "swiglu")
    table = tokens_to_reach(found, found.reference)
    assert cells(table, "GELU")["by validation loss"].text == "not reached"


def test_answer_says_what_the_numbers_say(group):
    first, errors, order = answer(group)
    assert first.startswith("In validation loss PolyNorm ends below SwiGLU by 0.167")
    assert "GELU by 0.250" in first and "each in 3 of 3 seeds. " in first
    # Differences -0.2, -0.1, -0.2 and -0.3, -0.05, -0.4: below zero by five standard errors and
    # by 2.4, of which Student's t with two degrees of freedom requires 4.3.
    assert first.replace("\u00a0", " ").endswith(
        "PolyNorm cannot be distinguished from GELU: the 95 % interval of the difference "
        "(Student's t) contains zero."
    )
    assert errors.startswith("± is the standard error")
    assert order == "Final validation losses in order: PolyNorm 2.933 < SwiGLU 3.100 < GELU 3.183."


def test_answer_does_not_hide_a_loss(tmp_path):
    runs = []
    ends = {"relu": (2.0, 2.1, 2.2), "polynorm": (2.3, 2.0, 2.5)}
    for activation, losses_of_seeds in ends.items():
        for seed, loss in enumerate(losses_of_seeds):
            folder = tmp_path / f"{activation}.{seed}"
            options = {"activation": activation, "seed": seed, "evaluations": {2: {"a": loss}}}
            runs.append(read_run(write_run(folder, [3.0, 3.0], **options)))
    (found,) = group_runs(runs, "swiglu")
    first = answer(found)[0].replace("\u00a0", " ")
    # Differences 0.3, -0.1, 0.3.
    error = statistics.stdev([0.3, -0.1, 0.3]) / math.sqrt(3)
    assert f"does not end below ReLU (+0.167 ± {error:.3f}, lower in 1 of 3 seeds)" in first
    assert "PolyNorm cannot be distinguished from ReLU" in first
    assert found.reference is None


def test_a_loss_that_is_not_finite_is_not_left_out_of_a_difference(tmp_path):
    runs = []
    ends = {"swiglu": (2.0, 2.0), "relu": (2.2, 2.2), "polynorm": (1.9, math.nan)}
    for activation, losses_of_seeds in ends.items():
        for seed, loss in enumerate(losses_of_seeds):
            options = {"activation": activation, "seed": seed, "evaluations": {1: {"a": loss}}}
            runs.append(read_run(write_run(tmp_path / f"{activation}.{seed}", [3.0], **options)))
    (found,) = group_runs(runs, "swiglu")
    row = cells(losses(found), "PolyNorm")
    assert [row[name].text for name in ("validation loss", "minus SwiGLU", "lower in")] == ["–"] * 3
    assert answer(found) == [
        "PolyNorm cannot be compared with any fixed activation: no seed is shared, or a run has no "
        "finite loss.",
        "Final validation losses in order: SwiGLU 2.000 < ReLU 2.200. 1 more ended without a "
        "finite loss.",
    ]
    axes = final_losses(found).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["SwiGLU", "ReLU", "PolyNorm"]
    # Dots of each, and a bar at the mean of those whose runs all have one.
    drawn = [line for line in axes.lines if line.get_color() != MUTED]
    assert [len(line.get_xdata()) for line in drawn] == [2, 2, 2, 2, 1]


def test_one_seed_is_no_spread(tmp_path):
    runs = [
        read_run(write_run(tmp_path / a, [3.0], activation=a, evaluations={1: {"a": loss}}))
        for a, loss in (("swiglu", 2.0), ("polynorm", 1.9))
    ]
    (found,) = group_runs(runs, "swiglu")
    assert answer(found)[:2] == [
        "In validation loss PolyNorm ends below SwiGLU by 0.100.",
        "A single seed does not show how much the results vary.",
    ]


def test_best_rate_at_the_edge_is_said(tmp_path):
    runs = []
    for activation, best in (("swiglu", 2e-3), ("polynorm", 4e-3)):
        for lr in (1e-3, 2e-3, 4e-3):
            loss = 2.0 + abs(math.log2(lr / best))
            folder = tmp_path / f"{activation}.{lr}"
            options = {"activation": activation, "lr": lr, "evaluations": {1: {"a": loss}}}
            runs.append(read_run(write_run(folder, [3.0], **options)))
    (found,) = group_runs(runs, "swiglu")
    table = learning_rates(found)
    assert table.columns == ["activation", "0.001", "0.002", "0.004"]
    chosen = {label: [c.text for c in row if c.best] for label, row in table.rows}
    assert chosen == {"SwiGLU": ["2.000"], "PolyNorm": ["2.000"]}
    assert table.notes[1:] == [
        "PolyNorm is best at the highest rate that was tried (0.004); a rate beyond it "
        "may be better."
    ]


def test_curves_show_the_whole_band_and_the_reference(tmp_path):
    """Differences are -0.1 and -0.3 from the first fifth on, far below the reference's zero."""
    runs = []
    for activation, gaps in (("swiglu", (0.0, 0.0)), ("polynorm", (-0.1, -0.3))):
        for seed, gap in enumerate(gaps):
            evaluations = {step: {"a": 3.0 - step / 10 + gap} for step in range(1, 11)}
            options = {"activation": activation, "seed": seed, "evaluations": evaluations}
            folder = tmp_path / f"{activation}.{seed}"
            runs.append(read_run(write_run(folder, [3.0] * 10, **options)))
    (found,) = group_runs(runs, "swiglu")
    losses, differences = curves(Curves(found, found.entries, validation=True)).axes
    low, high = differences.get_ylim()
    assert low < -0.3 < high and low < 0 < high
    low, high = losses.get_ylim()
    assert low < 1.7 and 2.8 < high < 3.0, "from the end's lowest to what lies behind a fifth"


def test_a_rate_that_diverged_was_tried(tmp_path):
    """PolyNorm is lost at 0.004 with its only seed, and at 0.002, where it is best, with one."""
    trials = {}
    for activation in ("swiglu", "polynorm"):
        for lr, loss in ((1e-3, 3.0), (2e-3, 2.0), (4e-3, 2.5)):
            for seed in (1, 2) if lr < 4e-3 else (1,):
                name = f"{activation}.lr_{lr:g}.seed_{seed}"
                options = {"activation": activation, "lr": lr, "seed": seed, "steps": 2}
                options["evaluations"] = {2: {"a": loss}}
                if activation == "polynorm" and (lr, seed) in ((2e-3, 2), (4e-3, 1)):
                    write_run(tmp_path / name, [9.0], source=None, **options)
                    trials[name] = {"wall_time_s": 1.0, "phase": "rates", "diverged": True}
                else:
                    write_run(tmp_path / name, [3.0, loss], **options)
    comparison = {"commands": ["compare"], "trials": trials, "chosen": {}}
    (tmp_path / "comparison.json").write_text(json.dumps(comparison))
    (found,) = group_runs(read([tmp_path]).runs, "swiglu")
    table = learning_rates(found)
    assert {label: [(c.text, c.below, c.best) for c in row] for label, row in table.rows} == {
        "SwiGLU": [
            ("3.000", "2 seeds: 3.000", False),
            ("2.000", "2 seeds: 2.000", True),
            ("2.500", "1 seed", False),
        ],
        "PolyNorm": [
            ("3.000", "2 seeds: 3.000", True),
            ("diverged", "1 of 2 seeds", False),
            ("diverged", "1 of 1 seeds", False),
        ],
    }
    assert table.notes[1:] == [
        "PolyNorm is best at the lowest rate that was tried (0.001); a rate beyond it "
        "may be better."
    ]


def test_options_are_compared_with_the_reference_that_has_them(tmp_path):
    ends = {"swiglu": (3.0, 2.0), "polynorm": (2.5, 2.1)}
    runs = []
    for activation, (plain, changed) in ends.items():
        for loss, overrides in ((plain, ()), (changed, ("--model.init_method_std", "0.05"))):
            folder = tmp_path / f"{activation}.{loss}"
            evaluations = {1: {"a": 9.0}, 2: {"a": loss}}
            options = {"activation": activation, "evaluations": evaluations, "overrides": overrides}
            runs.append(read_run(write_run(folder, [3.0, 3.0], **options)))
    # One seed more, so that these are the most of the group.
    runs.append(read_run(write_run(tmp_path / "2", [3.0, 3.0], evaluations=evaluations, seed=2)))
    (found,) = group_runs(runs, "swiglu")
    changed = cells(losses(found), "PolyNorm; init_method_std 0.05")
    assert (changed["minus SwiGLU"].text, changed["lower in"].text) == ("+0.1000", "0 of 1")
    assert cells(losses(found), "PolyNorm")["minus SwiGLU"].text == "−0.5000"
    table = tokens_to_reach(found, found.reference)
    assert (
        cells(table, "PolyNorm; init_method_std 0.05")["by validation loss"].text == "not reached"
    )
    assert answer(found)[2] == (
        "With init_method_std 0.05: in validation loss PolyNorm does not end below SwiGLU (+0.100)."
    )
