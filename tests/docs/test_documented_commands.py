"""Every command in README and docs is one that its program takes."""

import importlib
import inspect
import re
import shlex

import pytest
import torch
import yaml
from documented import PAGES, ROOT, blocks, commands
from torch.distributed.run import get_args_parser

from megapoly.commands import COMMANDS, module_of
from megapoly.commands.benchmark import BENCHMARKS
from megapoly.commands.preprocess import SUBCOMMANDS, subcommand_parser
from megapoly.config import Config
from megapoly.config.command_line import parse_with_overrides
from megapoly.config.parsing import override, parse
from megapoly.config.recipes import recipe_path

# Of other projects. What they start of ours is parsed below.
OTHERS = {"apptainer", "cd", "du", "enroot", "git", "kubectl", "mkdir", "scancel", "scontrol"}
OTHERS |= {"sky", "tensorboard", "vllm"}
# They take fields of the configuration besides their own options.
WITH_OVERRIDES = {"analyze", "check-parallel", "compare", "evaluate", "plan", "soak"}
FOUND = [(page, words) for page in PAGES for words in commands(page)]


def name(value):
    return value.relative_to(ROOT).name if hasattr(value, "relative_to") else " ".join(value)


@pytest.mark.parametrize(("page", "words"), FOUND, ids=name)
def test_is_taken(page, words, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    check(words)


def check(words):
    while words[0] == "time" or re.fullmatch("[A-Z_]+=.*", words[0]):  # a variable of this command
        words = words[1:]
    program, *rest = words
    if program in OTHERS:
        return
    CHECKS[program](rest)


def check_megapoly(words):
    command, *rest = words
    if command == "train":
        check_training(rest)
    elif command == "launch":
        check_torchrun(rest)
    elif command == "benchmark" and rest[0] in BENCHMARKS:
        importlib.import_module(f"megapoly.benchmarks.{rest[0]}").build_parser().parse_args(
            rest[1:]
        )
    elif command == "preprocess" and rest[0] in SUBCOMMANDS:
        subcommand_parser(rest[0]).parse_args(rest[1:])
    elif rest != ["--help"]:
        check_options(command, rest)


def check_options(command, words):
    parser = module_of(command).build_parser()
    if command not in WITH_OVERRIDES:
        options = parser.parse_args(words)
    else:
        options, overrides = parse_with_overrides(parser, words)
        override(Config(), overrides)
    given = getattr(options, "config", None) or []
    for recipe in [given] if isinstance(given, str) else given:
        check_recipe(recipe)
    if getattr(options, "launcher", None):
        check(shlex.split(options.launcher))


def check_recipe(recipe):
    """Recipes of runs do not exist here."""
    assert recipe.startswith("runs/") or recipe_path(recipe).is_file()


def check_training(words):
    """Options of the configuration, `--nproc-per-node` of `megapoly train`, recipes."""
    if words == ["--help"]:
        return
    words = list(words)
    if "--nproc-per-node" in words:
        at = words.index("--nproc-per-node")
        assert int(words[at + 1]) > 0
        del words[at : at + 2]
    known, recipes = [], []
    while words:
        word = words.pop(0)
        if word == "--config":
            recipes.append(words.pop(0))
        else:
            known.append(word)
    for recipe in recipes:
        check_recipe(recipe)
    parse(known, default_recipe="moe_tiny", program="documented")


def check_script(words):
    script, *rest = words
    assert (ROOT / script).is_file()
    check_training(rest)


def check_torchrun(words):
    options = get_args_parser().parse_args(words)
    if options.module:
        assert options.training_script == "megapoly"
        check_megapoly(options.training_script_args)
    else:
        check_script([options.training_script, *options.training_script_args])


def check_bash(words):
    if words[0].startswith("examples/data/"):
        assert (ROOT / words[0]).is_file()
    else:
        check_script(words)


def check_sbatch(words):
    """Its options, the job's script, ours."""
    job = words.index("examples/slurm/pretrain.sbatch")
    assert (ROOT / words[job]).is_file()
    check_script(words[job + 1 :])


def check_docker(words):
    """What runs in the image, if it is ours; Dockerfiles."""
    if "--file" in words:
        assert (ROOT / words[words.index("--file") + 1]).is_file()
    if "make" in words:
        check_make(words[words.index("make") + 1 :])


def check_launcher(words):
    """`docker/launch.sh`, whose own options tests/launchers runs."""
    script = next(i for i, word in enumerate(words) if word.startswith("examples/"))
    check_script(words[script:])


def check_make(words):
    targets = re.findall(r"^([\w./-]+|\$\(INSTALLED\)):", (ROOT / "Makefile").read_text(), re.M)
    variables = [word for word in words if "=" in word]
    for target in set(words) - set(variables):
        assert target in targets or target == ".venv/.installed"
    for variable in variables:
        assert f"{variable.partition('=')[0]} ?=" in (ROOT / "Makefile").read_text()


def check_pip(words):
    """Extras that setup.py has; of other projects only a name."""
    assert words[0] == "install"
    extras = re.findall(r"(?:megapoly|\.)\[([\w,]+)\]", " ".join(words))
    for extra in ",".join(extras).split(",") if extras else ():
        assert re.search(rf'^ +"{extra}":', (ROOT / "setup.py").read_text(), re.MULTILINE), extra


def check_python(words):
    if words[0] == "-m" and words[1] == "pytest":
        assert all((ROOT / word).exists() for word in words[2:] if word.startswith("tests"))
    elif words[0] == "-m":
        source = inspect.getsource(importlib.import_module(words[1]))
        assert all(f'"{word}"' in source for word in words if word.startswith("--"))
    else:
        assert (ROOT / words[0]).is_file()


def check_pre_commit(words):
    assert words == ["install"] and (ROOT / ".pre-commit-config.yaml").is_file()


CHECKS = {
    ".venv/bin/pre-commit": check_pre_commit,
    "megapoly": check_megapoly,
    "torchrun": check_torchrun,
    "bash": check_bash,
    "sbatch": check_sbatch,
    "docker": check_docker,
    "docker/launch.sh": check_launcher,
    "make": check_make,
    "pip": check_pip,
    "python": check_python,
}


def test_there_are_some():
    assert len(FOUND) > 90
    assert {words[1] for _, words in FOUND if words[0] == "megapoly"} >= {
        *(command for command in COMMANDS if command not in ("completion",))
    }


@pytest.mark.parametrize(
    "line",
    [
        "megapoly train --config moe_tinny",
        "megapoly plan --config moe_tiny --word-size 8",
        "megapoly compare --activations gelu --config moe_tiny --output x --model.num_layer 1",
        "torchrun --processes 2 examples/pretrain_moe.sh",
        "sbatch examples/slurm/pretrain.sbatch examples/pretrain_none.sh",
        "make pretrian",
        "pip install 'megapoly[trian]'",
        "python -m megapoly.ops.triton.ahead_of_time --order 3",
        "rm -r runs",
    ],
)
def test_a_wrong_one_is_found(line, capsys):
    with pytest.raises((Exception, SystemExit)):
        check(shlex.split(line))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_extras_exist(page):
    """Those of `pip install` in sentences also."""
    for extras in re.findall(r"pip install '(?:megapoly|\.)\[([\w,]+)\]'", page.read_text()):
        check_pip(["install", f"megapoly[{extras}]"])


def test_yaml_and_python_blocks_are_read():
    for page in PAGES:
        for block in blocks(page, "yaml"):
            yaml.safe_load(block)
        for block in blocks(page, "python"):
            compile(block, page.name, "exec")


@pytest.mark.parametrize(
    "page", ["README.md", "docs/explanation/operators.md", "docs/how-to/own_model.md"]
)
def test_python_blocks_run(page):
    """Those that need nothing that the reader has to make first."""
    found = blocks(ROOT / page, "python")
    assert found
    for block in found:
        values = {}
        with torch.compiler.set_stance("force_eager"):  # `auto` would compile
            exec(compile(block, page, "exec"), values)
        if "spec" in values:  # a layer spec, built and not called
            assert values["experts"].submodules.activation_func is values["activation"]
            continue
        assert (
            values["y"].isfinite().all() and values["y"].shape == values.get("x", values["y"]).shape
        )
