"""The notebook runs; the generated reference has every option and every command."""

import argparse
import importlib.util

import nbformat
import pytest
from documented import ROOT, arguments_of
from matplotlib import image
from nbclient import NotebookClient

from megapoly.commands import COMMANDS, module_of
from megapoly.config.options import OPTIONS

NOTEBOOK = ROOT / "docs" / "notebooks" / "operators.ipynb"


@pytest.fixture(scope="module")
def reference():
    path = ROOT / "docs" / "hooks" / "reference.py"
    spec = importlib.util.spec_from_file_location("reference_pages", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def printed(notebook):
    """What the cells print, without the rounding of what they compare."""
    texts = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.output_type == "stream":
                assert output.name == "stdout", output.text
                texts.append(output.text)
    return texts


def numbers(texts):
    """The numbers in what is printed."""
    found = []
    for word in " ".join(texts).replace("(", " ").replace(",", " ").replace(")", " ").split():
        try:
            found.append(float(word))
        except ValueError:
            continue
    return found


@pytest.mark.slow  # three processes that import torch
@pytest.mark.filterwarnings("ignore::DeprecationWarning:jupyter_client")
def test_the_notebook_prints_what_it_shows():
    committed = nbformat.read(NOTEBOOK, as_version=4)
    fresh = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(
        fresh, timeout=300, kernel_name="python3", resources={"metadata": {"path": "."}}
    ).execute()
    shown, again = printed(committed), printed(fresh)
    assert len(shown) == len(again) >= 7
    for a, b in zip(shown, again, strict=True):
        assert [w for w in a.split() if w.isalpha()] == [w for w in b.split() if w.isalpha()]
        for x, y in zip(numbers([a]), numbers([b]), strict=True):
            assert x == pytest.approx(y, rel=1e-2) or of_one_size(x, y), (a, b)


def of_one_size(x, y):
    """Errors by rounding, which is another on another processor."""
    small, large = sorted((abs(x), abs(y)))
    return large < 1e-15 or (large < 1e-3 and large < 5 * small)


def test_configuration_page_has_every_option(reference):
    page = reference.configuration_page()
    lines = page.splitlines()
    terms = {line.split("`")[1]: i for i, line in enumerate(lines) if line.startswith("`")}
    for key, option in OPTIONS.items():
        assert option.description.split()[0].strip("`:;,") in lines[terms[key] + 1]
    for key, shown in {
        "model.moe_aux_loss_coeff": "= `0.01`, a finite number; at least 0 and at most 1e+06",
        "parallel.tensor_model_parallel_size": "= `1`, a whole number; at least 1 and at most "
        "2147483647",
        "training.bf16": "= `false`, true or false",
        "parallel.recompute_modules": "= `[core_attn]`, a list of core_attn, mlp, moe",
        "data.seed": "= `1234`, a whole number; at least 0 and below 4294967296",
        "data.blend.tokens": "= `null`, a whole number, or null; above 0 and at most "
        "999999999999999999",
    }.items():
        assert lines[terms[key]].endswith(shown)


def test_commands_page_has_every_option(reference):
    page = reference.commands_page()
    for name in COMMANDS:
        section = page.split(f"## megapoly {name} {{")[1].split("\n## ")[0]
        build = getattr(module_of(name), "build_parser", None)
        for action in build()._actions if build else ():
            if action.help == argparse.SUPPRESS or action.dest in ("help", *OPTIONS):
                continue
            assert all(flag in section for flag in action.option_strings), (name, action)
    for name in ("preprocess merge", "benchmark operators"):
        assert f"### megapoly {name} " in page


@pytest.mark.parametrize(
    ("text", "markdown"),
    [
        ("    megapoly plan\n      --json", "```bash\nmegapoly plan\n  --json\n```"),
        ("name   meaning\nother  more", "```text\nname   meaning\nother  more\n```"),
        ("a ``*.jsonl`` or *.idx <s>,\nand more", r"a `*.jsonl` or \*.idx &lt;s>, and more"),
        ("see :mod:`megapoly.data.order`", "see `megapoly.data.order`"),
    ],
)
def test_docstrings_become_markdown(reference, text, markdown):
    assert "\n".join(reference._paragraph(text)) == markdown


def test_api_shows_the_values_of_defaults(reference):
    page = "see :func:<code>f</code>, order = DEFAULT_ORDER, eps = DEFAULT_EPS"
    shown = reference.on_page_content(page, None, None, None)
    assert shown == "see <code>f</code>, order = 3, eps = 1e-06"


def test_figure_is_what_its_command_draws(tmp_path):
    """The command stands below the figure in README."""
    (arguments,) = arguments_of(
        "README.md", "megapoly", "report", "examples/paper/report/report.json"
    )
    figures, name, output, _ = arguments
    assert (figures, output) == ("--figures", "--output")
    report = str(ROOT / "examples" / "paper" / "report" / "report.json")
    assert module_of("report").main([report, "--figures", name, "--output", str(tmp_path)]) == 0
    drawn, shown = (
        image.imread(folder / f"{name}.png")
        for folder in (tmp_path / "figures", ROOT / "docs" / "images")
    )
    # Versions of matplotlib smooth edges differently.
    assert drawn.shape == shown.shape and abs(drawn - shown).mean() < 2e-3
