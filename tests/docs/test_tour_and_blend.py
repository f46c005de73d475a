"""The documented blend is one that a recipe takes; the tour of the code names what exists."""

from fractions import Fraction
from pathlib import Path

from documented import ROOT, blocks

from megapoly.config.data_sources import blend_sources, shares, validation_sets
from megapoly.config.parsing import load_yaml


def test_the_blends_are_ones_that_a_recipe_takes(tmp_path):
    of_files, of_stores = blocks(ROOT / "docs" / "how-to" / "blends.md", "yaml")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(of_stores)
    data = load_yaml(recipe).data
    assert [source.path for source in blend_sources(data)] == ["s3://bucket/cc/*_text_document"]
    assert list(validation_sets(data)) == ["wiki"]
    recipe.write_text(of_files)
    data = load_yaml(recipe).data
    sources = blend_sources(data)
    assert [source.name for source in sources] == [
        "web",
        "wiki_text_document",
        "code_text_document",
    ]
    assert shares(sources, [0, 0, 0]) == [Fraction(7, 10), Fraction(2, 10), Fraction(1, 10)]
    assert list(validation_sets(data)) == ["wiki", "code"]


def test_tour_names_what_exists():
    (tree,) = blocks(ROOT / "CONTRIBUTING.md", "text")
    top = ""
    for line in tree.strip().splitlines():
        name = line.split()[0].rstrip(",")
        if not line.startswith(" "):
            top = name
        path = ROOT / name if line.startswith(name) else ROOT / top / name
        assert path.exists(), path


def test_tour_names_every_package():
    (tree,) = blocks(ROOT / "CONTRIBUTING.md", "text")
    packages = {path.parent.name for path in Path(ROOT / "megapoly").glob("*/__init__.py")}
    assert packages <= {line.split()[0].rstrip("/") for line in tree.splitlines()}
