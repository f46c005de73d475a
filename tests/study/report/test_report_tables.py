import json
import math
import statistics
from dataclasses import replace

import pytest
from made_runs import write_run

from megapoly.study.figure_style import MUTED
from megapoly.study.report import results
from megapoly.study.report.answer import answer
from megapoly.study.report.content import read
from megapoly.study.report.end_figures import final_losses
from megapoly.study.report.grouping import group_runs
from megapoly.study.report.loss_figures import Curves, curves
from megapoly.study.report.ranking import rankings
from megapoly.study.report.run_tables import learning_rates
from megapoly.study.report.runs import read_run
from megapoly.study.report.tables import costs_to_reach, domains, losses, tasks

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
    assert row["paper: training loss"].text == "2.172"


def test_difference_to_the_reference_has_the_interval_of_the_ranking(group):
    row = cells(losses(group), "GELU")
    (ranking,) = rankings(group)
    assert row["minus SwiGLU"].text == f"{statistics.mean([0.1, -0.05, 0.2]):+.4f}"
    assert row["minus SwiGLU"].spread == f"± {ranking.fit.half_interval:.4f}"
    assert row["lower in"].text == "1 of 3"


def test_perplexity_by_domain(group):
    row = cells(domains(group), "SwiGLU")
    assert row["b"].text == f"{statistics.mean(math.exp(x + 0.5) for x in (3.0, 3.2, 3.1)):.2f}"
    assert row["b"].below == "3.600"


def test_benchmarks_have_the_errors_of_seeds_and_of_questions(tmp_path):
    """Of two tasks, one has no recorded errors; the higher score is bold."""
    scores = {"swiglu": (40.0, 42.0, 41.0), "polynorm": (52.0, 54.0, 53.5)}
    runs = []
    for activation, of_seeds in scores.items():
        for seed, score in enumerate(of_seeds):
            options = {"activation": activation, "seed": seed, "evaluations": {1: {"a": 2.0}}}
            options |= {"tasks": {"piqa": score, "arc": 30.0 + seed}}
            errors = {"piqa": 3.0 + seed}
            folder = tmp_path / f"{activation}.{seed}"
            runs.append(read_run(write_run(folder, [3.0], task_errors=errors, **options)))
    (found,) = group_runs(runs, "swiglu")
    row = cells(tasks(found), "PolyNorm")
    assert (row["piqa"].text, row["piqa"].best) == (f"{159.5 / 3:.1f}", True)
    assert row["piqa"].spread == f"± {statistics.stdev(scores['polynorm']):.1f}"
    assert row["piqa"].below == f"± {math.sqrt((9 + 16 + 25) / 3):.1f} of questions"
    assert (row["arc"].text, row["arc"].below, row["arc"].best) == ("31.0", "", False)
    assert not cells(tasks(found), "SwiGLU")["piqa"].best


def test_tokens_to_reach(group):
    row = cells(costs_to_reach(group, group.reference), "PolyNorm")
    # Halfway and on: 0.5 + 0.5 (3.5 - 3.0) / 0.7, (3.6 - 3.2) / 0.5; (3.1 - 3.1): at once.
    shares = [0.5 + 0.5 * 0.5 / 0.7, 0.5 + 0.5 * 0.4 / 0.5, 0.5]
    assert row["tokens"].text == f"{statistics.mean(shares):.2f}"
    assert row["tokens"].spread == f"± {statistics.stdev(shares):.2f}"
    # Only the second seed: 0.5 + 0.5 (4.1 - 3.2) / 0.95.
    row = cells(costs_to_reach(group, group.reference), "GELU")
    share = 0.5 + 0.5 * 0.9 / 0.95
    assert (row["tokens"].text, row["tokens"].below) == ("1 of 3 seeds", f"in these {share:.2f}")


def test_flops_and_time_to_reach(tmp_path):
    """Time is that of the wall clocks of one comparison; a narrower FFN has fewer FLOPs."""
    narrow = ("--model.ffn_hidden_size", "260")
    trials = {}
    for seed, times in ((1, (10.0, 30.0)), (2, (20.0, 30.0))):
        for activation, end, time in zip(("relu", "polynorm"), (3.0, 2.0), times, strict=True):
            name = f"{activation}.{seed}"
            evaluations = {1: {"a": 4.0}, 2: {"a": end}}
            options = {"activation": activation, "seed": seed, "evaluations": evaluations}
            overrides = narrow if activation == "relu" else ()
            write_run(tmp_path / name, [4.0, end], overrides=overrides, **options)
            trials[name] = {"wall_time_s": time, "phase": "seeds"}
    comparison = {"commands": ["compare"], "trials": trials, "chosen": {}}
    (tmp_path / "comparison.json").write_text(json.dumps(comparison))
    runs = read([tmp_path]).runs
    (found,) = group_runs(runs, "relu")
    # 3.0 halfway between 4.0 and 2.0: three quarters of the run; three times and 1.5 times as long.
    (polynorm,) = [entry for entry in found.entries if entry.activation == "polynorm"]
    row = cells(costs_to_reach(found, found.reference), polynorm.label)
    assert row["tokens"].text == "0.75"
    assert row["time"].text == f"{0.75 * (3 + 1.5) / 2:.2f}"
    # Forward multiply-adds of a layer: 4 h^2 projections, s h of attention, 2 h f; and h V.
    hidden, layers, length, vocabulary = 64, 4, 64, 512

    def forward(width):
        layer = 4 * hidden**2 + length * hidden + 2 * hidden * width
        return layers * layer + hidden * vocabulary

    reach = results.reach(polynorm, found.reference, validation=True)
    ratio = forward(264) / forward(260)
    assert reach.flops == pytest.approx({"1": 0.75 * ratio, "2": 0.75 * ratio}, rel=1e-12)
    # Of other comparisons, or of none, times do not compare.
    apart = [replace(run, comparison=None) for run in runs]
    (found,) = group_runs(apart, "relu")
    row = cells(costs_to_reach(found, found.reference), polynorm.label)
    assert (row["tokens"].text, row["time"].text) == ("0.75", "–")


def test_not_reached(group):
    by_label = {entry.label: entry for entry in group.entries}
    found = results.reach(by_label["SwiGLU"], by_label["PolyNorm"], validation=True)
    assert (found.tokens, found.flops, found.seeds) == ({}, {}, 3)


def test_a_run_that_ends_above_has_not_reached_it(tmp_path):
    ends = {"swiglu": (4.0, 3.0), "gelu": (2.9, 3.1)}
    runs = []
    for activation, (half, end) in ends.items():
        options = {"activation": activation, "evaluations": {1: {"a": half}, 2: {"a": end}}}
        runs.append(read_run(write_run(tmp_path / activation, [3.0, 3.0], **options)))
    (found,) = group_runs(runs, "swiglu")
    table = costs_to_reach(found, found.reference)
    assert cells(table, "GELU")["tokens"].text == "not reached"


def test_answer_says_what_the_numbers_say(group):
    (ranking,) = rankings(group)
    limit = f"{ranking.fit.half_interval:.3f}"
    sentences = [sentence.replace("\u00a0", " ") for sentence in answer(group)]
    # Differences are judged by all runs: Student's t of three pairs would tell SwiGLU apart.
    assert sentences[0] == (
        "On seeds 1 to 3, no two of PolyNorm 2.933, SwiGLU 3.100 and GELU 3.183 can be "
        "distinguished by validation loss: the largest difference is 0.250, and it must exceed "
        f"{limit}."
    )
    assert sentences[1].startswith("± is half of the simultaneous 95 % interval (Tukey)")
    assert sentences[2] == (
        "Not tuned: every line was trained at one rate (0.001), which favours the line that it "
        "suits best."
    )


def test_answer_does_not_hide_a_loss(tmp_path):
    runs = []
    ends = {"relu": (2.0, 2.1, 2.2), "gelu": (2.9, 3.0, 3.1), "polynorm": (2.3, 2.1, 2.5)}
    for activation, losses_of_seeds in ends.items():
        for seed, loss in enumerate(losses_of_seeds):
            folder = tmp_path / f"{activation}.{seed}"
            options = {"activation": activation, "seed": seed, "evaluations": {2: {"a": loss}}}
            runs.append(read_run(write_run(folder, [3.0, 3.0], **options)))
    (found,) = group_runs(runs, "swiglu")
    sentences = [sentence.replace("\u00a0", " ") for sentence in answer(found)]
    assert sentences[0].startswith("On seeds 0 to 2, ReLU has the lowest validation loss, 2.100")
    assert sentences[1] == (
        "There PolyNorm, 2.300, ends below GELU by 0.700 and cannot be distinguished from ReLU "
        "(+0.200)."
    )
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
    axes = final_losses(found).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["SwiGLU", "ReLU", "PolyNorm"]
    # Dots of each; mean and interval of the two lines that are ranked.
    drawn = [line for line in axes.lines if line.get_color() != MUTED]
    assert [line.get_xdata()[0] for line in drawn] == pytest.approx([2.0, 2.2, 1.9, 2, 2, 2.2, 2.2])


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
    table = costs_to_reach(found, found.reference)
    assert cells(table, "PolyNorm; init_method_std 0.05")["tokens"].text == "not reached"
    assert (
        "With init_method_std 0.05, PolyNorm minus SwiGLU is +0.100 in one seed, not ranked."
    ) in answer(found)
