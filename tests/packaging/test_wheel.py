"""The wheel and the source distribution, as a user gets them: nothing else is there.

The environment is empty but for pip, and so is the folder. Packages come from the index that pip is
set up for; TORCH (as for make) says which torch.
"""

from __future__ import annotations

import email
import json
import math
import os
import shlex
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pytest
from sources import ROOT, copy_sources, needs_git, needs_make, source_files, values_of_make

# Installing and compiling take minutes where other work shares the cores.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800), needs_git, needs_make]

# A user's file, and what mypy must say of it: types, not Any, and what is wrong.
USERS_FILE = """\
import torch

from megapoly.config import Config, load_recipe
from megapoly.ops import polynorm

config = load_recipe("moe_tiny")
reveal_type(config)
reveal_type(config.model.hidden_size)
reveal_type(polynorm(torch.randn(2, 8), torch.zeros(4)))
polynorm("text", torch.zeros(4))
hidden: str = config.model.hidden_size
"""
MYPY = [
    'users.py:7: note: Revealed type is "megapoly.config.schema.Config"',
    'users.py:8: note: Revealed type is "int"',
    'users.py:9: note: Revealed type is "torch._tensor.Tensor"',
    'users.py:10: error: Argument 1 to "polynorm" has incompatible type "str"; expected "Tensor"'
    "  [arg-type]",
    'users.py:11: error: Incompatible types in assignment (expression has type "int", variable has '
    'type "str")  [assignment]',
]
OPERATOR = """\
import sys
import torch
from megapoly.ops import polynorm

x = torch.randn(5, 123, dtype=torch.float64)
coefficients = torch.tensor([0.5, 1.0, -2.0, 3.0], dtype=torch.float64)
expected = 0.5 + sum(
    a * x**p / (x ** (2 * p)).mean(-1, keepdim=True).add(1e-6).sqrt()
    for p, a in zip((1, 2, 3), coefficients[1:])
)
found = polynorm(x.float(), coefficients.float()).double()
torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
assert not {"megatron", "transformers", "yaml", "jsonargparse"} & sys.modules.keys()
"""


@dataclass(frozen=True)
class Environment:
    """A virtual environment and an empty folder to run its programs in."""

    folder: Path
    work: Path

    def run(self, *command: str, status: int = 0, **variables: str) -> str:
        """Run one of its programs there; return what it prints."""
        environment = {"HOME": str(self.folder), "PATH": f"{self.folder}/bin:/usr/bin:/bin"}
        environment |= {"OMP_NUM_THREADS": "1", "COLUMNS": "200"} | variables
        done = subprocess.run(
            [self.folder / "bin" / command[0], *command[1:]],
            cwd=self.work,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == status, done.stdout
        return done.stdout

    def install(self, *requirements: str) -> None:
        """Install as a user does, with the settings that pip has here."""
        pip = [str(self.folder / "bin/pip"), "install", "--quiet"]
        keys = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        subprocess.run([*pip, *requirements], env=keys, cwd=self.work, check=True)


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """The source distribution, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("build")
    copy_sources(folder / "sources")
    build = [sys.executable, "-m", "build", "--outdir", folder / "dist", folder / "sources"]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = (folder / "dist").glob("*.whl")
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    return {"wheel": wheel, "sdist": sdist}


def test_source_distribution_is_the_checkout(distributions: Mapping[str, Path]) -> None:
    with tarfile.open(distributions["sdist"]) as archive:
        members = {str(PurePosixPath(*PurePosixPath(m.name).parts[1:])): m for m in archive}
        links = [name for name, member in members.items() if member.issym() or member.islnk()]
        recipe = archive.extractfile(members["examples/configs/moe_tiny.yaml"]).read()
    assert sorted(set(source_files()) - members.keys()) == []
    assert links == []  # examples/configs has links to the recipes
    assert recipe == (ROOT / "megapoly/recipes/moe_tiny.yaml").read_bytes()


def test_wheel_is_the_package(distributions: Mapping[str, Path]) -> None:
    with zipfile.ZipFile(distributions["wheel"]) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
        fields = email.message_from_bytes(archive.read(metadata))
    package = {path for path in source_files() if path.startswith("megapoly/")}
    assert {path for path in package if not path.endswith("/README.md")} <= names <= package
    assert {"megapoly/py.typed", "megapoly/recipes/moe_tiny.yaml"} <= names
    assert fields["License-Expression"] == "Apache-2.0"
    assert fields["Author"] == "The megapoly authors"
    assert fields["Requires-Python"] == ">=3.10"
    assert "Typing :: Typed" in fields.get_all("Classifier")


def test_twine_accepts_both(distributions: Mapping[str, Path]) -> None:
    twine = [sys.executable, "-m", "twine", "check", "--strict", *distributions.values()]
    subprocess.run(twine, check=True)


@pytest.fixture(scope="module")
def base(
    distributions: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Environment:
    """The wheel without extras."""
    environment = Environment(tmp_path_factory.mktemp("env"), tmp_path_factory.mktemp("empty"))
    subprocess.run([sys.executable, "-m", "venv", environment.folder], check=True)
    environment.install(*shlex.split(values_of_make("TORCH")["TORCH"]))
    environment.install(str(distributions["wheel"]))
    return environment


@pytest.fixture(scope="module")
def engine(base: Environment, distributions: Mapping[str, Path]) -> Environment:
    """The wheel with what `make pretrain` installs, and a model of two steps in runs/moe_tiny."""
    base.install(f"{distributions['wheel']}[train,hf]")
    base.run(
        *"megapoly train --config moe_tiny --run_dir runs/moe_tiny".split(),
        *"--training.train_iters 2".split(),
    )
    return base


def test_base_runs_operators_without_the_engine(base: Environment) -> None:
    base.run("python", "-c", OPERATOR)
    base.run("python", "-c", "import megatron", status=1)


def test_base_has_help_recipes_and_doctor(base: Environment) -> None:
    assert "usage: megapoly COMMAND" in base.run("megapoly", "--help")
    assert base.run("python", "-m", "megapoly", "--version") == "megapoly 0.1.0\n"
    load = (
        "from megapoly.config import load_recipe as l; print(l('moe_tiny').model.num_moe_experts)"
    )
    assert int(base.run("python", "-c", load)) > 0
    assert "megatron-core" in base.run("megapoly", "doctor", status=1)
    assert "pip install" in base.run("megapoly", "train", "--config", "moe_tiny", status=2)


def test_types_reach_a_users_file(base: Environment, tmp_path: Path) -> None:
    (tmp_path / "users.py").write_text(USERS_FILE)
    mypy = [sys.executable, "-m", "mypy", "--python-executable", base.folder / "bin/python"]
    mypy += ["--no-error-summary", "--cache-dir", tmp_path / "cache", "users.py"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(mypy, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines() == MYPY


def test_trains_exports_generates_and_evaluates(engine: Environment) -> None:
    run = engine.work / "runs/moe_tiny"
    first, last = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    # Two steps from the start: still the loss of equal probabilities, ln of the 4,096 tokens.
    assert first["lm_loss"] == pytest.approx(math.log(4096), abs=0.1)
    assert last["iteration"] == 2 and last["lm_loss"] != first["lm_loss"]

    engine.run(*"megapoly export --model runs/moe_tiny --output exported".split())
    parity = json.loads((engine.work / "exported/parity.json").read_text())
    assert parity["passed"] and parity["argmax_agreement"] == 1.0
    texts = {
        engine.run(*f"megapoly generate --model {model} --temperature 0".split())
        for model in ("runs/moe_tiny", "exported")
    }
    assert len(texts) == 1 and texts.pop().startswith("It was the best of")
    evaluate = "megapoly evaluate --model runs/moe_tiny --perplexity --json out.json"
    engine.run(*evaluate.split())
    books = json.loads((engine.work / "out.json").read_text())["perplexity"]["domains"]["books"]
    assert books["loss"] == pytest.approx(last["val/books/loss"], rel=1e-5)


def test_plans_and_examines(engine: Environment) -> None:
    plan = engine.run(*"megapoly plan --config moe_7b_paper --world-size 64".split())
    assert "MFU" in plan
    assert "Training can run here." in engine.run("megapoly", "doctor")
