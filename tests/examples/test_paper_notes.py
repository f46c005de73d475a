"""The findings of examples/paper/notes.md are those of examples/paper/report/report.json."""

import re
from pathlib import Path

import pytest

from megapoly.study.report import results
from megapoly.study.report.content import read
from megapoly.study.report.grouping import group_runs
from megapoly.study.report.groups import Entry, RunGroup, final_loss
from megapoly.study.report.ranking import ranking_of, rankings

PAPER = Path(__file__).parents[2] / "examples/paper"


@pytest.fixture(scope="module")
def groups() -> dict[str, RunGroup]:
    content = read([PAPER / "report/report.json"])
    return {group.slug: group for group in group_runs(content.runs, content.reference)}


@pytest.fixture(scope="module")
def notes() -> str:
    return " ".join((PAPER / "notes.md").read_text().split())


def by_label(group: RunGroup) -> dict[str, Entry]:
    return {entry.label: entry for entry in group.entries}


# Group, line, other line, whether the ranking distinguishes them, and the passage that says it.
DIFFERENCES = [
    ("moe", "PolyNorm", "SwiGLU", True, "it ends {} below SwiGLU"),
    ("moe", "PolyNorm", "ReLU", True, "{} below ReLU and"),
    ("moe", "PolyNorm", "GELU", True, "and {} below GELU (each"),
    ("dense", "PolyReLU r=3", "PolyNorm", False, "lowest mean, {} below PolyNorm"),
    ("dense", "PolyReLU r=3", "SwiGLU", False, "PolyNorm and {} below SwiGLU, both open"),
    ("dense", "PolyReLU r=3", "GELU", True, "below GELU by {}"),
    ("dense", "PolyReLU r=3", "ReLU", True, "and below ReLU by {}"),
    ("dense", "PolyNorm", "ReLU", True, "PolyNorm ends below ReLU by {}"),
    ("dense", "PolyNorm", "SwiGLU", False, "differences to SwiGLU, {} below"),
    ("dense", "PolyNorm", "GELU", False, "to GELU, {} below, are open"),
    ("dense_3", "PolyNorm", "SwiGLU", False, "ends {} below it (open"),
    ("dense_2", "PolyNorm", "SwiGLU", False, "PolyNorm ends {} below SwiGLU (±"),
    ("dense", "PolyNorm; lr_warmup_iters 400", "PolyNorm", False, "PolyNorm ends {} lower"),
    ("dense", "SwiGLU; lr_warmup_iters 400", "SwiGLU", False, "and SwiGLU {} higher, both open"),
    (
        "dense",
        "PolyNorm; lr_warmup_iters 400",
        "SwiGLU; lr_warmup_iters 400",
        False,
        "PolyNorm then ends {} below SwiGLU, lower in all three seeds, also open",
    ),
    ("dense", "PolyNorm; activation_norm l2", "PolyNorm", True, "costs PolyNorm {}"),
    ("dense", "PolyNorm; activation_eps 0.001", "PolyNorm", False, "changes it by {}, open"),
    ("dense", "gated PolyNorm", "SwiGLU", False, "as a gate ends {} above SwiGLU, open"),
    ("dense", "PolyReLU r=4", "PolyReLU r=3", False, "PolyReLU of order 4 ends {}"),
    ("dense", "PolyReLU r=2", "PolyReLU r=3", False, "order 2 ends {} above order 3, both open"),
    ("dense", "ReLU²", "ReLU", False, "ReLU² ends {} below ReLU, open"),
    ("dense", "PolyReLUNorm", "PolyReLU r=3", False, "PolyReLUNorm ends {} above PolyReLU"),
    ("dense", "PolyReLUNorm", "PolyNorm", False, "and {} below PolyNorm, both open"),
]


@pytest.mark.parametrize(("slug", "one", "other", "distinguished", "passage"), DIFFERENCES)
def test_a_difference_is_that_of_the_ranking(
    groups: dict[str, RunGroup],
    notes: str,
    slug: str,
    one: str,
    other: str,
    distinguished: bool,
    passage: str,
) -> None:
    group = groups[slug]
    pair = by_label(group)[one], by_label(group)[other]
    ranking = ranking_of(rankings(group), *pair)
    assert ranking is not None
    gap = ranking.difference(*pair)
    assert passage.format(f"{abs(gap):.3f}") in notes
    below = any(word in passage for word in ("below", "lower"))
    above = any(word in passage for word in ("above", "higher", "costs"))
    assert (below and gap < 0) or (above and gap > 0) or not (below or above)
    assert ranking.distinguished(*pair) == distinguished


@pytest.mark.parametrize(
    ("slug", "number", "passage"),
    [
        ("moe", 0, "(each ± {})"),
        ("dense", 0, "both open (± {})"),
        ("dense", 1, "a difference must exceed {}:"),
        ("dense_2", 0, "below SwiGLU (± {})"),
        ("dense_3", 0, "(open, ± {}:"),
    ],
)
def test_an_interval_is_that_of_the_ranking(
    groups: dict[str, RunGroup], notes: str, slug: str, number: int, passage: str
) -> None:
    half = rankings(groups[slug])[number].fit.half_interval
    assert passage.format(f"{half:.3f}") in notes


def test_correlations_and_costs_are_those_of_the_tables(
    groups: dict[str, RunGroup], notes: str
) -> None:
    for slug in ("moe", "dense"):
        assert f"correlation {rankings(groups[slug])[0].fit.correlation:.2f})" in notes
    moe = by_label(groups["moe"])
    reach = results.reach(moe["PolyNorm"], moe["SwiGLU"], validation=True)
    assert reach is not None and reach.always
    tokens, time = (sum(each.values()) / reach.seeds for each in (reach.tokens, reach.time))
    assert f"after {tokens:.2f} of the tokens and FLOPs" in notes
    assert f"after {time:.2f} of the time" in notes


def test_changes_of_one_seed_are_those_of_the_runs(groups: dict[str, RunGroup], notes: str) -> None:
    lines = by_label(groups["dense"])
    losses = {
        name: final_loss(lines[f"{name}; init_method_std 0.02"].seeds["1"])
        - final_loss(lines[name].rates[8e-3]["1"])
        for name in ("PolyNorm", "SwiGLU", "ReLU", "GELU")
    }
    expected = (
        "PolyNorm loses {PolyNorm:.2f}, SwiGLU {SwiGLU:.2f}, ReLU {ReLU:.2f} and GELU {GELU:.2f}"
    )
    assert expected.format(**losses) in notes
    long = by_label(groups["dense_3"])
    gaps: dict[int, list[float]] = {4000: [], 8000: []}
    for seed in "123":
        for step, found in gaps.items():
            one, other = (
                dict(zip(*long[name].seeds[seed].curve(validation=True), strict=True))
                for name in ("PolyNorm", "SwiGLU")
            )
            found.append(one[step * 1024] - other[step * 1024])
    assert "below SwiGLU by {:.3f}, {:.3f} and {:.3f} at".format(*(-g for g in gaps[4000])) in notes
    assert "{:+.3f}, {:+.3f}, {:+.3f})".format(*gaps[8000]) in notes


def test_untuned_lines_and_single_seeds_are_said(groups: dict[str, RunGroup], notes: str) -> None:
    """All lines besides the five of the dense comparison and the four of the mixture."""
    tuned = {
        slug: [entry.label for entry in group.entries if len(entry.tried) > 1]
        for slug, group in groups.items()
    }
    assert tuned == {
        "dense": ["SwiGLU", "GELU", "ReLU", "PolyReLU r=3", "PolyNorm"],
        "dense_2": [],
        "dense_3": [],
        "moe": ["SwiGLU", "GELU", "ReLU", "PolyNorm"],
    }
    rest = [e for g in groups.values() for e in g.entries if len(e.tried) == 1]
    assert {entry.lr for entry in rest} == {8e-3}
    assert "All of these runs have the rate 0.008 and no other" in notes
    single = {e.variant.get("model.init_method_std") for e in rest if len(e.seeds) == 1}
    assert single == {0.02}
    assert re.search(r"standard deviation of 0.02 .*?, in one seed,", notes)
