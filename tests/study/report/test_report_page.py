"""The page and the command, on runs of a few steps."""

import importlib.util
import json
import math
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path

import pytest
from made_runs import write_run

from megapoly.activations.registry import ACTIVATIONS
from megapoly.commands.report import main
from megapoly.study.report import content as contents
from megapoly.study.report.figures import pictures
from megapoly.study.report.svg import svg

ROOT = Path(__file__).parents[3]
COEFFICIENT = "activation/layer_00/ffn/a0"
GAPS = {"swiglu": 0.0, "relu": 0.1, "squared_relu": 0.05, "polyrelu": -0.05, "polynorm": -0.1}


def write(folder: Path, name: str, activation: str, *, gap: float, **options) -> Path:
    losses = [4.0 + gap + 2.0 * math.exp(-i / 5) for i in range(40)]
    evaluations = {
        step: {"wiki": losses[step - 1] - 0.2, "code": losses[step - 1] + 0.1}
        for step in (20, 30, 40)
    }
    return write_run(
        folder / name, losses, activation=activation, evaluations=evaluations, **options
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folder with the runs of a comparison in ``dense`` and its report in ``page``."""
    folder = tmp_path_factory.mktemp("report")
    runs = folder / "dense"
    for activation, gap in GAPS.items():
        for seed in (1, 2):
            write(runs, f"{activation}.seed_{seed}", activation, gap=gap + seed / 100, seed=seed)
    for name, lr in (("swiglu", 2e-3), ("polynorm", 2e-3)):
        write(runs, f"{name}.lr_2e-3", name, gap=0.3, lr=lr)
    other = ("--model.activation_order", "2")
    write(runs, "polyrelu_order_2", "polyrelu", gap=0.0, overrides=other)
    write(runs, "polynorm_l2", "polynorm", gap=0.2, overrides=("--model.activation_norm", "l2"))
    write(runs, "unfinished", "gelu", gap=0.0, steps=50)
    analysis = {
        "command": "megapoly analyze --model polynorm.seed_1",
        "activation": "polynorm",
        "num_layers": 1,
        "coefficients": {
            "tokens": [0, 10],
            "series": {COEFFICIENT: [0.0, 0.123456789]},
        },
    }
    (runs / "polynorm.seed_1/analysis").mkdir()
    (runs / "polynorm.seed_1/analysis/analysis.json").write_text(json.dumps(analysis))
    comparison = {
        "commands": [f"python {folder}/tools/compare_activations.py --config tiny.yaml"],
        "hardware": {"cpu": "some <CPU>", "cores": 2, "memory_gib": 8, "gpu": None},
        "versions": {"torch": "2.13.0"},
        "trials": {"polynorm.seed_1": {"wall_time_s": 3600.0, "phase": "seeds"}},
        "chosen": {},
    }
    (runs / "comparison.json").write_text(json.dumps(comparison))
    (folder / "notes.md").write_text("The **gap** is small.\n\n![x](https://example.org/x.png)\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["dense", "--output", "page", "--notes", "notes.md", "--title", "A & B"]) == 0
    return folder


class References(HTMLParser):
    """Files that a page would load, its elements, its ids and its text."""

    def __init__(self, text: str):
        super().__init__()
        self.in_code = False
        self.loaded, self.ids, self.text, self.tags, self.code = [], [], "", [], ""
        self.elements = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.elements.append((tag, dict(attrs)))
        self.code += "\n" * (tag == "code")
        self.in_code = self.in_code or tag == "code"
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "srcset", "data", "href", "xlink:href") and tag != "a":
                self.loaded.append(value)
            if name == "style":
                self.loaded += re.findall(r"url\(([^)]*)\)", value)
            if name == "clip-path":
                self.loaded += re.findall(r"url\(([^)]*)\)", value)

    def handle_endtag(self, tag):
        self.in_code = self.in_code and tag != "code"

    def handle_data(self, data):
        self.text += data
        self.code += data * self.in_code


def test_page_needs_nothing_besides_itself(made):
    page = (made / "page/index.html").read_text()
    found = References(page)
    outside = [r for r in found.loaded if not r.startswith(("#", "data:"))]
    assert outside == []
    assert not {"link", "iframe", "object", "embed"} & set(found.tags)
    assert "@import" not in page and "@font-face" not in page
    # What is referred to is there, and once.
    assert {r[1:] for r in found.loaded if r.startswith("#")} <= set(found.ids)
    assert len(found.ids) == len(set(found.ids))


def test_every_part_can_be_found_and_named(made):
    found = References((made / "page/index.html").read_text())
    by_tag = {}
    for tag, attributes in found.elements:
        by_tag.setdefault(tag, []).append(attributes)
    headings = [each for tag, each in found.elements if re.fullmatch(r"h[2-4]", tag)]
    links = [each["href"] for each in by_tag["a"]]
    # The author's own headings in the notes may be without.
    assert len(headings) > 20 and all(each.get("id") for each in headings)
    assert {each[1:] for each in links if each.startswith("#")} <= set(found.ids)
    # The contents and the heading itself link to each table and figure of a group.
    figures = [each for each in found.ids if (made / f"page/figures/{each}.png").exists()]
    assert len(figures) == 10 and all(links.count(f"#{each}") == 2 for each in figures)
    assert len(by_tag["table"]) == len(by_tag["caption"]) == 8
    labels = [each["aria-label"] for each in by_tag["button"] if each.get("class") == "copy"]
    assert len(labels) == len(set(labels)) == 13
    assert "copy the command that draws figure dense_domains" in labels


def test_two_builds_are_equal_byte_for_byte(made, tmp_path):
    assert main([str(made / "page/report.json"), "--output", str(tmp_path / "again")]) == 0
    files = sorted(path.relative_to(made / "page") for path in (made / "page").rglob("*.*"))
    assert len(files) == 12
    for file in files:
        assert (tmp_path / "again" / file).read_bytes() == (made / "page" / file).read_bytes(), file


def test_headings_leave_out_no_level(made):
    tags = References((made / "page/index.html").read_text()).tags
    levels = [int(tag[1]) for tag in tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(next_ <= level + 1 for level, next_ in zip(levels, levels[1:], strict=False))


def test_lines_stand_out_from_both_grounds(made):
    page = (made / "page/index.html").read_text()
    for rule in re.findall(r"color-scheme: \w+; --paper[^}]*", page):
        colours = dict(re.findall(r"(--[a-z0-9-]+): (#[0-9a-f]{6})", rule))
        lines = {name for name in colours if name.startswith("--series")}
        assert len(lines) == len(ACTIVATIONS)
        # WCAG 2.2: 4.5 for text, 3 for what a figure is read by.
        for name in lines:
            assert contrast(colours[name], colours["--paper"]) >= 3, name
        for name in ("--ink", "--muted", "--accent"):
            assert contrast(colours[name], colours["--paper"]) >= 4.5, name
        assert contrast(colours["--muted"], colours["--wash"]) >= 4.5


def contrast(one: str, other: str) -> float:
    """Ratio of the relative luminances, as WCAG defines them."""

    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


def test_page_says_what_it_is_made_of(made):
    page = (made / "page/index.html").read_text()
    found = References(page)
    for part in (
        "A & B",
        "PolyNorm has the lowest validation loss, 3.866: below PolyReLU r=3 by 0.050, SwiGLU by",
        "The gap is small.",
        "unfinished: step 40 of 50",
        "python tools/compare_activations.py --config tiny.yaml",
        "some <CPU>, 2 cores, 8 GiB memory",
        "1 h 4 min in total",
        "cosine, to 0.1 of it",
        "of at most 2,560 tokens of each, the same for all runs",
        "ffffffffffff0001",
        "1,345,423,456",
        "PolyNorm; activation_norm l2",
    ):
        assert part in found.text, part
    assert "example.org" not in page or "<img" not in page
    assert "prefers-color-scheme: dark" in page
    assert len(page) < 3e6


def test_every_figure_is_drawn_again_by_its_command(made, monkeypatch):
    monkeypatch.chdir(made / "page")
    page = References((made / "page/index.html").read_text()).code
    commands = re.findall(r"megapoly report (\S+ --figures \S+ --output \S+)", page)
    names = {path.stem for path in (made / "page/figures").glob("*.png")}
    assert {
        "dense_training_loss",
        "dense_validation_loss",
        "dense_final_loss",
        "dense_tokens_to_reach",
        "dense_domains",
        "dense_learning_rates",
        "dense_order_polyrelu",
        "dense_relu_variants",
        "dense_variants_polynorm",
        "dense_coefficients_polynorm",
    } == names
    assert {shlex.split(command)[2] for command in commands} == names
    before = {name: (made / f"page/figures/{name}.png").read_bytes() for name in names}
    for path in (made / "page/figures").iterdir():
        path.unlink()
    arguments = [shlex.split(command) for command in commands]
    # One by its own command, the others in one go: each draws what the page has alone.
    assert main(arguments[0]) == 0
    assert [path.stem for path in (made / "page/figures").iterdir()] == [arguments[0][2]]
    rest = [each[2] for each in arguments]
    assert main([arguments[0][0], "--figures", *rest, "--output", arguments[0][4]]) == 0
    after = {name: (made / f"page/figures/{name}.png").read_bytes() for name in names}
    assert before == after


def test_drawings_of_the_page_are_functions_of_report_json(made):
    page = (made / "page/index.html").read_text()
    content = contents.read([made / "page/report.json"])
    picture = next(p for p in pictures(content) if p.name == "dense_training_loss")
    assert svg(picture.figure(), picture.name, f"{picture.title}. {picture.caption}") in page


def test_drawings_follow_the_page(made):
    page = (made / "page/index.html").read_text()
    drawing = page[page.index('id="dense_training_loss"') :]
    drawing = drawing[: drawing.index("</svg>")]
    used = set(re.findall(r"var\((--[a-z0-9-]+)", drawing))
    assert {"--ink", "--muted", "--grid"} <= used
    defined = re.findall(r"(--[a-z0-9-]+):", page)
    # On light ground and, once for the toggle and once for the setting, on dark.
    assert all(defined.count(name) == 3 for name in used)
    assert re.findall(r"#[0-9a-f]{6}", drawing) == []


def test_reports_are_merged(made, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(made)
    folder = tmp_path / "more"
    write(folder, "gelu.seed_1", "gelu", gap=-1.0)
    # The run of seed 1 as it is, once more: the later counts.
    arguments = [str(made / "page/report.json"), str(folder), str(made / "dense/swiglu.seed_1")]
    assert main([*arguments, "--output", str(tmp_path / "page")]) == 0
    assert "Not ranked (a single seed): GELU, " in capsys.readouterr().out.splitlines()[0]
    old = json.loads((made / "page/report.json").read_text())
    both = json.loads((tmp_path / "page/report.json").read_text())
    assert len(both["runs"]) == len(old["runs"]) + 1
    assert (both["title"], both["notes"]) == (old["title"], old["notes"])
    assert both["comparisons"] == old["comparisons"]


def test_report_json_holds_no_place_on_disk(made):
    text = (made / "page/report.json").read_text()
    assert str(made) not in text and "/somewhere" not in text
    runs = {run["name"]: run for run in json.loads(text)["runs"]}
    kept = runs["polynorm.seed_1"]["analysis"]["coefficients"]["series"][COEFFICIENT]
    assert kept == [0.0, 0.12346]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{made}/dense/none"], "does not exist"),
        (["{made}/page/figures"], "contains no run, which is a folder with `config.yaml`"),
        (
            ["{made}/dense/unfinished"],
            r"None of the runs is complete \(unfinished at step 40 of 50",
        ),
        (["{made}/notes.md"], "is not a report.json"),
        (["{made}/page/report.json", "--reference", "swish"], "the nearest is swiglu"),
        (
            ["{made}/page/report.json", "--figures", "dense_trainin_loss"],
            r"dense_final_loss, .*; the nearest is dense_training_loss",
        ),
        (["{made}/page/report.json", "--theory", "{made}"], "theory.json"),
    ],
)
def test_errors(made, tmp_path, capsys, arguments, message):
    arguments = [each.format(made=made) for each in arguments]
    assert main([*arguments, "--output", str(tmp_path / "page")]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "page").exists()


HOSTILE = "<img src=x onerror=alert(1)>\"'&{{7*7}}$x"


def test_names_and_texts_are_no_markup(tmp_path, monkeypatch):
    """Names of runs, domains, tasks, sources and machines, titles, notes and commands."""
    monkeypatch.chdir(tmp_path)
    losses = [4.0, 3.5, 3.2]
    for activation in ("swiglu", "polynorm"):
        name = f"{activation} {HOSTILE}"
        evaluations = {step: {HOSTILE: 3.0, "wiki": 2.0} for step in (2, 3)}
        folder = write_run(
            tmp_path / "runs" / name,
            losses,
            activation=activation,
            evaluations=evaluations,
            tasks={HOSTILE: 51.5},
            overrides=("--data.tokenizer", HOSTILE),
        )
        (path,) = folder.glob("checkpoints/*/run.json")
        run = json.loads(path.read_text())
        run["data"]["sources"][0] |= {"name": HOSTILE, "fingerprint": HOSTILE}
        path.write_text(json.dumps(run | {"data_fingerprint": HOSTILE}))
    comparison = {
        "commands": [HOSTILE],
        "hardware": {"cpu": HOSTILE, "gpu": HOSTILE},
        "versions": {HOSTILE: HOSTILE},
        "trials": {},
        "chosen": {},
    }
    (tmp_path / "runs/comparison.json").write_text(json.dumps(comparison))
    notes = f"{HOSTILE} <script>alert(1)</script> [a](javascript:alert(1)) <{HOSTILE}>"
    (tmp_path / "notes.md").write_text(notes)
    arguments = ["runs", "--output", "page", "--notes", "notes.md", "--title", HOSTILE]
    assert main(arguments) == 0
    page = References((tmp_path / "page/index.html").read_text())
    assert page.text.count("<img src=x onerror=alert(1)>") > 10
    assert "{{7*7}}$x" in page.text
    assert "img" not in page.tags and page.tags.count("script") == 1
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        assert not (attributes.get("href") or "").startswith("javascript:")
    assert all(place.startswith("#") for place in page.loaded)


def test_missing_package_is_said(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main([str(tmp_path), "--output", str(tmp_path / "page")]) == 2
    assert "pip install 'megapoly[report]'" in capsys.readouterr().err


def test_mixtures_tasks_and_theory(tmp_path, monkeypatch):
    from megapoly.commands import theory

    monkeypatch.chdir(tmp_path)
    experts = ("--model.num_moe_experts", "4")
    for activation, gap in (("swiglu", 0.0), ("polynorm", 0.1)):
        write(
            tmp_path / "moe",
            activation,
            activation,
            gap=gap,
            overrides=experts,
            tasks={"piqa": 51.5},
        )
    monkeypatch.setattr(theory, "EXPONENTS", [1, 5])
    monkeypatch.setattr(theory, "TOLERANCES", [1e-1, 1e-2, 1e-3])
    cells = {key: (2, 4, 6) for key in theory.CELLS if key[0] == 1}
    monkeypatch.setattr(theory, "CELLS", cells)
    monkeypatch.setattr(theory, "SMOOTHNESS", dict.fromkeys(cells, (1,)))
    (tmp_path / "T").mkdir()
    (tmp_path / "T/theory.json").write_text(json.dumps(theory.measure_all()))
    assert main(["moe", "--output", "page", "--theory", "T"]) == 0
    found = References((tmp_path / "page/index.html").read_text())
    for part in (
        "Final validation losses with seed 1: SwiGLU 3.951, PolyNorm 4.051.",
        "Benchmark tasks",
        "51.5",
        "6,919,161,920, 1,282,017,344 active",
        "paper: validation loss",
        "megapoly theory --output T",
    ):
        assert part in found.text, part
    names = {path.stem for path in (tmp_path / "page/figures").glob("*.png")}
    statements = {f"theory_{name}" for name in ("theorem_1", "lemma_a4", "lemma_2", "theorem_2")}
    assert statements | {"theory_theorem_3", "moe_training_loss"} <= names
    path = tmp_path / "page/figures/theory_lemma_2.png"
    drawn = path.read_bytes()
    path.unlink()
    command = re.search(r"megapoly report (\S+ --figures theory_lemma_2 --output \S+)", found.code)
    monkeypatch.chdir(tmp_path / "page")
    assert main(shlex.split(command[1])) == 0
    assert path.read_bytes() == drawn
