"""Command lines in the README are ones that the scripts take."""

import re
import shlex
from fractions import Fraction
from pathlib import Path

import pytest

from megapoly.commands import module_of
from megapoly.config.data_sources import blend_sources, shares, validation_sets
from megapoly.config.parsing import load_yaml, parse
from megapoly.config.recipes import recipe_path
from megapoly.errors import ConfigError

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def command_lines():
    """Words after the script's name, of every line that starts one; `...` stands for more."""
    joined = re.sub(r"--launcher '[^']*'", "", README.replace("\\\n", " "))
    for match in re.finditer(r"^ +.*(examples/pretrain_\w+\.sh)(.*)$", joined, re.MULTILINE):
        script, options = match.groups()
        yield script, [word for word in shlex.split(options) if word not in ("...", "--help")]


@pytest.mark.parametrize(("script", "options"), list(command_lines()))
def test_options_are_known(monkeypatch, script, options):
    monkeypatch.chdir(ROOT)
    assert (ROOT / script).is_file()
    recipe = ROOT / "examples" / "configs" / "moe_tiny.yaml"
    parse(options, default_recipe=recipe, program=script)


def tool_lines():
    """Name and words of every line that starts one of the tools of a comparison."""
    joined = README.replace("\\\n", " ")
    names = "compare|analyze|report"
    for match in re.finditer(rf"^ +megapoly ({names}) (.*)$", joined, re.MULTILINE):
        yield match[1], shlex.split(match[2])


@pytest.mark.parametrize(("name", "words"), list(tool_lines()))
def test_options_of_tools_are_known(monkeypatch, name, words):
    monkeypatch.chdir(ROOT)
    options, rest = module_of(name).build_parser().parse_known_args(words)
    assert not rest
    assert all(recipe_path(name).is_file() for name in getattr(options, "config", []))


def test_the_blend_is_one_that_a_recipe_takes(tmp_path):
    (block,) = re.findall(r"^```yaml\n(data:\n.*?)^```", README, re.MULTILINE | re.DOTALL)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(block)
    data = load_yaml(recipe).data
    sources = blend_sources(data)
    assert [source.name for source in sources] == [
        "web",
        "wiki_text_document",
        "code_text_document",
    ]
    assert shares(sources, [0, 0, 0]) == [Fraction(7, 10), Fraction(2, 10), Fraction(1, 10)]
    assert list(validation_sets(data)) == ["wiki", "code"]


def test_there_are_some():
    assert len(list(command_lines())) >= 5
    with pytest.raises(ConfigError, match="nearest"):
        parse(["--model.num_layer=1"], default_recipe=Path("."), program="a wrong line")


def test_tree_names_what_exists():
    tree = README.split("## The tree")[1].split("```")[1]
    top = ""
    for line in tree.strip().splitlines():
        name = line.split()[0].rstrip(",")
        if not line.startswith(" "):
            top = name
        path = ROOT / name if line.startswith(name) else ROOT / top / name
        assert path.exists(), path
