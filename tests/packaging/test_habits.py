"""What runs before a commit, on a server and by hand is the same; forms and requirements hold."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.utils import canonicalize_name
from sources import ROOT, needs_git, needs_make, requirements, source_files

FORMS = ["bug.yml", "feature.yml", "question.yml"]
# Required though no module imports it, and why.
NOT_IMPORTED = {
    "accelerate": "transformers and lm-eval load models with it",
    "flash-attn": "imported by Megatron-Core",
    "s3fs": "imported by fsspec",
    "setuptools": "imported by torch.compile",
}
# Imported though setup.py does not name it, and why.
NOT_REQUIRED = {
    "awkward": "comes with gigatoken",
    "docstring-parser": "comes with jsonargparse[signatures]",
    "liger-kernel": "compared with where it is installed",
    "markupsafe": "comes with jinja2",
    "triton": "comes with torch for CUDA; reported as missing elsewhere",
}


def commands_of(target: str) -> list[str]:
    """Return the commands that a target of the Makefile runs once everything is installed."""
    stamps = [f"--old-file=.venv/.installed{part}" for part in ("", "-paper", "-docs", "-test")]
    make = ["make", "--no-print-directory", "--dry-run", *stamps, target]
    printed = subprocess.run(make, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [line for line in printed.splitlines() if line.startswith((".venv/bin/", "for "))]


def hooks() -> dict[str, dict]:
    settings = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    return {hook["id"]: hook for repo in settings["repos"] for hook in repo["hooks"]}


@needs_git
@needs_make
def test_hooks_run_what_make_check_runs() -> None:
    """Each hook with all files that it takes is one command of `make lint` or of `make docs`."""
    files = source_files()
    found = []
    for hook in hooks().values():
        takes = re.compile(hook.get("files", ""))
        leaves_out = re.compile(hook.get("exclude", "^$"))
        names = [path for path in files if takes.search(path) and not leaves_out.search(path)]
        passed = names if hook.get("pass_filenames", True) else []
        found.append((hook["entry"], sorted(passed)))
    expected = []
    for command in commands_of("lint"):
        words = command.split()
        if words[0] == "for":  # for script in A B; do ...
            scripts = command.removeprefix("for script in ").split(";")[0].split()
            expected.append((hooks()["shellcheck-pretrain"]["entry"], scripts))
        elif Path(words[0]).name in ("hadolint", "shellcheck"):
            expected.append((words[0], sorted(words[1:])))
        else:
            expected.append((command, []))
    expected.append(("make docs", []))
    assert sorted(found) == sorted(expected)
    assert "sed '/^exec /q'" in commands_of("lint")[-1]  # the loop that the hook has, too
    assert 'sed "/^exec /q"' in hooks()["shellcheck-pretrain"]["entry"]


def test_hooks_need_no_download() -> None:
    assert {hook["language"] for hook in hooks().values()} == {"system"}
    command = [Path(sys.executable).with_name("pre-commit"), "validate-config"]
    subprocess.run([*command, ROOT / ".pre-commit-config.yaml"], check=True)


@needs_make
def test_server_runs_ci_and_ci_runs_the_targets() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    steps = workflow["jobs"]["ci"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == [".ci/run"]
    script = (ROOT / ".ci/run").read_text()
    targets = re.findall(r"^make (\S+)$", script, re.MULTILINE)
    assert targets == ["check", "test", "test-slow"]
    assert commands_of("check") == commands_of("lint") + commands_of("docs")
    pytest_ = ".venv/bin/python -m pytest --dist loadfile --no-loadscope-reorder"
    assert commands_of("test") == [f"{pytest_} -n 3"]
    assert commands_of("test-slow") == [f"{pytest_} -n 2 -m slow"]


@pytest.mark.parametrize("name", FORMS)
def test_issue_forms(name: str) -> None:
    """What GitHub requires of a form; a bug comes with what doctor says."""
    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE" / name).read_text())
    assert form["name"] and form["description"]
    ids = [part["id"] for part in form["body"]]
    assert len(ids) == len(set(ids))
    for part in form["body"]:
        assert part["type"] in ("input", "textarea") and part["attributes"]["label"]
    required = [p["id"] for p in form["body"] if p.get("validations", {}).get("required")]
    assert required
    if name == "bug.yml":
        (doctor,) = [part for part in form["body"] if part["id"] == "doctor"]
        assert "`megapoly doctor --json`" in doctor["attributes"]["label"] and "doctor" in required


def imported_names(folder: Path) -> dict[str, str]:
    """Return every top-level package that modules of a folder import, and one module that does."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            else:
                continue
            found |= {name.split(".")[0]: path.relative_to(ROOT).as_posix() for name in names}
    # `_typeshed` is for types alone.
    ours = sys.stdlib_module_names | {"megapoly", "_typeshed"}
    return {name: path for name, path in found.items() if name not in ours}


def test_every_import_is_required_and_every_requirement_imported() -> None:
    required = {
        canonicalize_name(each.name)
        for extra, lines in requirements().items()
        if extra not in ("docs", "test")
        for each in lines
    }
    distributions = packages_distributions()
    imported = set()
    for name, path in imported_names(ROOT / "megapoly").items():
        providers = {canonicalize_name(each) for each in [name, *distributions.get(name, [])]}
        assert providers & (required | NOT_REQUIRED.keys()), f"{path} imports {name}"
        imported |= providers
    assert required - imported == NOT_IMPORTED.keys()


def test_base_has_no_engine() -> None:
    """Operators, help and recipes install without what trains, opens or evaluates a model."""
    base = {each.name for each in requirements()[""]}
    assert base.isdisjoint({"megatron-core", "transformers", "tensorboard", "tokenizers"})
    everything = {each.name for each in requirements()["all"]}
    for extra in ("train", "data", "hf", "eval", "report", "bench", "s3"):
        assert {each.name for each in requirements()[extra]} <= everything


# Functions that run code in what they open, and the argument with which they do not.
RUN_CODE = {
    "eval": None,
    "exec": None,
    "pickle.load": None,
    "pickle.loads": None,
    "pickle.Unpickler": None,
    "marshal.loads": None,
    "shelve.open": None,
    "yaml.load": None,
    "yaml.full_load": None,
    "yaml.unsafe_load": None,
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
}


# Modules that call one of them nevertheless, and why.
OWN_PROCESSES = {
    "megapoly/training/checkpoint_files.py": "reads a file without a name, of a process it forked"
}


def calls_that_run_code(text: str) -> list[str]:
    """Return the lines of a module that open something so that code in it runs."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call) or ast.unparse(node.func) not in RUN_CODE:
            continue
        safe = RUN_CODE[ast.unparse(node.func)]
        given = {word.arg: getattr(word.value, "value", None) for word in node.keywords}
        if safe is None or given.get(safe[0]) is not safe[1]:
            found.append(ast.unparse(node))
    return found


def test_what_runs_code_is_recognised() -> None:
    unsafe = ["torch.load(f)", "np.load(f, allow_pickle=x)", "pickle.loads(b'')", "yaml.load(a, B)"]
    safe = ["torch.load(f, weights_only=True)", "np.load(f, allow_pickle=False)", "json.load(f)"]
    assert calls_that_run_code("\n".join([*unsafe, *safe])) == unsafe


@needs_git
def test_nothing_is_opened_so_that_its_code_runs() -> None:
    """See docs/explanation/trust.md."""
    found = {
        path: lines
        for path in source_files()
        if path.endswith(".py") and path.startswith(("megapoly/", "tools/", "examples/", "docker/"))
        if (lines := calls_that_run_code((ROOT / path).read_text()))
    }
    assert found.keys() <= OWN_PROCESSES.keys(), found
