"""Every path, module and link in README and docs exists."""

import importlib
import re
import subprocess
from functools import cache

import pytest
from documented import PAGES, ROOT

from megapoly.study import report

TOP = "megapoly|tests|examples|tools|docker|docs"
NAMED = r"(?<![\w/.*-])((?:%s)/[\w./*-]*\w/?)"


@cache
def files():
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return listed.stdout.split()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_exist(page):
    named = re.findall(NAMED % TOP, page.read_text())
    assert not [path for path in named if not (ROOT / path).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page):
    """Names without a folder, such as `test_dry_run.py`, in code."""
    names = {path.rpartition("/")[2] for path in files()}
    named = re.findall(r"`(\w+\.(?:py|sbatch))`", page.read_text())
    assert not [name for name in named if name not in names]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_modules_exist(page):
    for dotted in re.findall(r"\bmegapoly(?:\.\w+)+", page.read_text()):
        if not dotted.endswith((".git", ".sif", ".sqsh")):
            resolve(dotted)


def resolve(dotted):
    """Import as much as is a module, and look up the rest."""
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError as error:
            if not ".".join(parts).startswith(error.name or "?"):
                raise
            continue
        for name in parts[end:]:
            found = getattr(found, name)
        return found
    raise AssertionError(dotted)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        if "://" in target or path.endswith(("reference/configuration.md", "reference/cli.md")):
            continue
        if path in ("configuration.md", "cli.md", "report/index.html", "../report/index.html"):
            continue  # made when the pages are built
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            assert anchor in [slug(heading) for heading in headings], target


def slug(heading):
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())


def test_a_wrong_name_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("`tests/none.py`, [x](none.md), megapoly.none, `test_none.py`")
    for test in (
        test_paths_exist,
        test_named_files_exist,
        test_modules_exist,
        test_links_lead_somewhere,
    ):
        with pytest.raises((AssertionError, AttributeError)):
            test(page)
    assert resolve("megapoly.study.report") is report


def is_defined(dotted):
    """Look for the names in the module's text: importing it would import the engine."""
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:end])
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                text = file.read_text()
                return all(re.search(rf"\b{name}\b", text) for name in parts[end:])
    return False


def wrong_references(source):
    """Return the cross-references of docstrings and comments that name nothing."""
    found = re.findall(r":(?:mod|func|class|meth|data|attr):`~?(megapoly[\w.]*)`", source)
    return [dotted for dotted in found if not is_defined(dotted)]


def test_references_in_the_code_exist():
    wrong = {
        path: found
        for path in files()
        if path.startswith("megapoly/") and path.endswith(".py")
        if (found := wrong_references((ROOT / path).read_text()))
    }
    assert not wrong
    assert wrong_references(":func:`megapoly.platform.none`") == ["megapoly.platform.none"]


def test_readme_is_short_and_says_first_what_is_not_proven():
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 1000
    assert "not run yet" in "\n".join(text.splitlines()[:15])
