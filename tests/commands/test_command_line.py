"""All commands from the outside: help, misspelled and earlier options, missing packages."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from megapoly.commands import COMMANDS, benchmark, doctor, help_text, main, module_of, preprocess
from megapoly.commands.train import build_parser as train_parser
from megapoly.config.command_line import Parser
from megapoly.config.options import OPTIONS
from megapoly.platform import extras

# Of the other two, torchrun reads the options of one, and `megapoly.config.parsing` of the other.
OWN_PARSER = [name for name in COMMANDS if name not in ("train", "launch")]
# torchrun's options need torch, and so does what the theory measures.
NEEDS_TORCH = ("theory", "launch")
WITHOUT_EXTRAS = [
    *(f"benchmark {name}" for name in benchmark.BENCHMARKS),
    *(f"preprocess {name}" for name in preprocess.SUBCOMMANDS),
    "completion bash",
]

# Runs `--help` of all commands in one process without any extra, those that import torch last.
HELP = f"""
import contextlib, io, json, sys
from megapoly.commands import COMMANDS, main
from megapoly.platform.extras import EXTRAS
sys.modules |= dict.fromkeys(each.partition(".")[0] for extra in EXTRAS.values() for each in extra)
found = {{}}
for name in [*sorted(COMMANDS, key={NEEDS_TORCH!r}.__contains__), *{WITHOUT_EXTRAS!r}]:
    with contextlib.redirect_stdout(io.StringIO()) as output:
        try:
            status = main([*name.split(), *([] if name == "completion bash" else ["--help"])])
        except SystemExit as stopped:
            status = stopped.code
    found[name] = [status, output.getvalue(), "torch" in sys.modules]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def help_of() -> dict[str, tuple[int, str, bool]]:
    output = subprocess.run([sys.executable, "-c", HELP], capture_output=True, check=True).stdout
    return json.loads(output)


def run(*argv: str) -> tuple[int, str]:
    """Exit status of ``megapoly``, and its output."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            return main(argv), output.getvalue()
        except SystemExit as stopped:
            return int(stopped.code or 0), output.getvalue()


def flags_of(name: str) -> list[str]:
    parser = module_of(name).build_parser()
    return [flag for flag in parser.flags() if flag.startswith("--")]


def misspelled(flag: str) -> str:
    """The flag with two letters in its middle swapped."""
    i = len(flag) // 2
    while flag[i] == flag[i + 1]:
        i += 1
    return f"{flag[:i]}{flag[i + 1]}{flag[i]}{flag[i + 2 :]}"


def test_the_list_of_commands_waits_for_nothing() -> None:
    script = (
        "import sys; from megapoly.commands import main; status = main(['--help']); "
        "print({'torch', 'numpy', 'yaml', 'rich'} & sys.modules.keys()); sys.exit(status)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0
    *lines, imported = result.stdout.splitlines()
    assert lines[0] == "usage: megapoly COMMAND [options]"
    assert imported == "set()"
    for name, command in COMMANDS.items():
        assert f"  {name:<17}  {command.summary}" in lines


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command(help_of: dict[str, tuple[int, str, bool]], name: str) -> None:
    status, text, imported_torch = help_of[name]
    assert status == 0
    assert text.startswith(f"usage: megapoly {name} ")
    assert imported_torch <= (name in NEEDS_TORCH)
    of_torchrun = ["--nnodes", "--nproc-per-node", "--rdzv-endpoint"]
    of_training = ["--config", "--nproc-per-node", "--run_dir"]
    flags = {"train": of_training, "launch": of_torchrun}.get(name) or flags_of(name)
    for flag in flags:
        assert flag in text
    summary = " ".join((module_of(name).__doc__ or "").split("\n\n")[0].split())
    assert summary in " ".join(text.split())


@pytest.mark.parametrize("name", WITHOUT_EXTRAS)
def test_help_of_parts_and_completion_need_no_extra(
    help_of: dict[str, tuple[int, str, bool]], name: str
) -> None:
    status, text, _ = help_of[name]
    assert status == 0
    assert f"megapoly {name}" in text or "_shtab_megapoly" in text


@pytest.mark.parametrize("command", ["--help", "train --help", "train --print-config"])
def test_ends_quietly_when_the_reader_has_ended(command: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(
        [sys.executable, "-m", "megapoly", *command.split()], stdout=writer, stderr=subprocess.PIPE
    )
    os.close(writer)
    assert (result.returncode, result.stderr) == (128 + signal.SIGPIPE, b"")


def test_a_misspelled_command() -> None:
    status, text = run("exprot", "--model", "x")
    assert status == 2 and "`exprot` is not a command; the nearest is `export`" in text
    assert run("help") == (0, f"{help_text()}\n")
    # What is like no command is not guessed.
    status, text = run("--config", "moe_tiny")
    assert status == 2 and "`--config` is not a command. `megapoly --help` lists" in text


@pytest.mark.parametrize("name", OWN_PARSER)
def test_a_misspelled_flag_names_the_nearest_of_its_command(name: str) -> None:
    for flag in flags_of(name):
        wrong = misspelled(flag)
        status, text = run(name, wrong, "x")
        assert status == 2
        assert f"unknown option {wrong} (the nearest is {flag})" in text
        status, text = run(name, f"{wrong}=x")
        assert status == 2 and f"(the nearest is {flag})" in text


def test_all_that_is_wrong_is_reported_together() -> None:
    """Unknown flags, required ones that are missing, values out of range and of no choice."""
    words = ["--foo", "x", "--gpu", "abacus", "--search", "0", "--gpus=b200"]
    status, text = run("plan", *words, "--model.num_layers", "2")
    assert status == 2 and text.count("error:") == 1
    for problem in (
        "unknown options --foo (the nearest is ",
        "--gpus (the nearest is --gpu)",
        "argument --gpu: invalid choice: 'abacus'",
        "argument --search: 0 must be a whole number, 1 to 2147483647",
        "the following arguments are required: --world-size",
    ):
        assert problem in text
    status, text = run("export", "--tolerance", "2", "--mode", "x")
    assert status == 2
    for problem in ("--mode (the nearest is --model)", "2 must be above 0", "required: --model"):
        assert problem in text


NUMBERS = [
    ("generate --model x --max-new-tokens", "1 to 2147483647"),
    ("generate --model x --seed", "0 to 4294967295"),
    ("generate --model x --temperature", "at most 100"),
    ("evaluate --model x --limit", "a whole number"),
    ("plan --world-size", "1 to 1048576"),
    ("preprocess --workers", "1 to 1024"),
    ("benchmark operators --threads", "1 to 1024"),
    ("benchmark operators --shapes", "ROWSxWIDTH"),
    ("compare --seeds", "0 to 4294967295"),
    ("check-parallel --world-size", "1 to 1024"),
    ("train --nproc-per-node", "1 to 1024"),
    ("soak --faults", "1 to 2147483647"),
    ("soak --nproc-per-node", "1 to 1024"),
    ("train --dry-run --world-size", "1 to 1048576"),
]


@pytest.mark.parametrize(("words", "range_"), NUMBERS)
@pytest.mark.parametrize("value", ["9" * 5000, "1e30", "010x", "nan", "0x", "1" * 40 + "x1"])
def test_numbers_have_a_range(
    monkeypatch: pytest.MonkeyPatch, words: str, range_: str, value: str
) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    status, text = run(*words.split(), value)
    assert status == 2 and range_ in text and "Traceback" not in text
    assert value in text or "99999..." in text


@pytest.mark.parametrize("name", [*OWN_PARSER, *WITHOUT_EXTRAS[:-1]])
def test_every_number_of_a_command_has_a_range(name: str) -> None:
    """No option converts with plain ``int`` or ``float``, which have no range."""
    command, _, part = name.partition(" ")
    if part and command == "benchmark":
        parser = importlib.import_module(f"megapoly.benchmarks.{part}").build_parser()
    elif part:
        parser = preprocess.subcommand_parser(part)
    else:
        parser = module_of(command).build_parser()
    assert [each.dest for each in parser._actions if each.type in (int, float)] == []


def test_a_misspelled_flag_of_train() -> None:
    flags = [action.option_strings[0] for action in train_parser()._actions]
    flags[flags.index("-h")] = "--help"
    assert {"--config", "--nproc-per-node", "--world-size", "--run_dir"} <= {*flags}
    assert {f"--{key}" for key in OPTIONS} <= {*flags}
    wrong = [misspelled(flag) for flag in flags]
    # All in one run: every mistake is reported.
    status, text = run("train", *(f"{flag}=x" for flag in wrong))
    assert status == 2
    for flag, misspelling in zip(flags, wrong, strict=True):
        key = flag.removeprefix("--")
        nearest = key if key in OPTIONS else flag
        assert (
            f"unknown option `{misspelling.removeprefix('--')}`; the nearest is `{nearest}`" in text
        )


def test_a_recipe_without_its_flag() -> None:
    assert (
        "`dense_tiny` is not an option; write `--config dense_tiny`"
        in run("train", "dense_tiny")[1]
    )
    assert "write `--config my.yaml`" in run("train", "my.yaml")[1]


def test_one_dash_is_a_misspelling() -> None:
    status, text = run("train", "-config", "moe_tiny")
    assert status == 2 and "`-config` is not an option; the nearest is `--config`" in text


@pytest.mark.parametrize(
    ("name", "wrong", "nearest"),
    [
        ("plan", "--num_layers", "--model.num_layers"),
        ("plan", "--world_size", "--world-size"),
        ("check-parallel", "--parallel-size", "--parallel.context_parallel_size"),
    ],
)
def test_options_of_the_configuration_are_among_the_nearest(
    name: str, wrong: str, nearest: str
) -> None:
    assert f"(the nearest is {nearest})" in run(name, wrong, "4")[1]


@pytest.mark.parametrize("name", [name for name in OWN_PARSER if COMMANDS[name].takes_overrides])
def test_commands_that_take_overrides(name: str) -> None:
    """Their parsers leave fields of the configuration to the reader of overrides."""
    assert hasattr(module_of(name), "parse_with_overrides")
    others = [other for other in OWN_PARSER if not COMMANDS[other].takes_overrides]
    assert not any(hasattr(module_of(other), "parse_with_overrides") for other in others)


@pytest.mark.parametrize(
    ("name", "earlier", "current"),
    [
        ("export", "--checkpoint", "--model"),
        ("analyze", "--checkpoint", "--model"),
        ("check-parallel", "--world_sizes", "--world-size"),
        ("check-parallel", "--timeout_s", "--timeout-s"),
        ("compare", "--processes", "--nproc-per-node"),
    ],
)
def test_earlier_spellings(
    help_of: dict[str, tuple[int, str, bool]], name: str, earlier: str, current: str
) -> None:
    parser = module_of(name).build_parser()
    assert isinstance(parser, Parser)
    assert current in parser.flags()
    assert parser.current_spelling([earlier, "4"]) == [current, "4"]
    assert parser.current_spelling([f"{earlier}=4"]) == [f"{current}=4"]
    assert earlier not in help_of[name][1]


def test_earlier_spellings_of_train(help_of: dict[str, tuple[int, str, bool]]) -> None:
    for earlier in ("--print_config", "--dry_run", "--world_size"):
        assert earlier not in help_of["train"][1]
    assert "`--dry-run` and `--print-config`" in run("train", "--print_config", "--dry_run")[1]
    assert "without `--dry-run`" in run("train", "--world_size", "4")[1]


@pytest.mark.parametrize(
    ("name", "module", "message"),
    [
        ("train", "megatron", "megatron-core: pip install 'megapoly[train]'"),
        ("compare", "tensorboard", "tensorboard: pip install 'megapoly[train]'"),
        ("compare", "scipy", "scipy: pip install 'megapoly[report]'"),
        ("plan", "tokenizers", "tokenizers: pip install 'megapoly[train]'"),
        ("generate", "transformers", "transformers: pip install 'megapoly[hf]'"),
        ("preprocess", "tokenizers", "tokenizers: pip install 'megapoly[data]'"),
        ("report", "jinja2", "jinja2: pip install 'megapoly[report]'"),
    ],
)
def test_a_missing_extra(
    monkeypatch: pytest.MonkeyPatch, name: str, module: str, message: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, f"{module}.core", raising=False)
    assert run(name, "--no-such-option") == (2, f"megapoly {name} needs {message}\n")


def test_the_benchmark_of_preprocessing_names_all_that_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in ("psutil", "orjson"):
        monkeypatch.setitem(sys.modules, module, None)
    expected = "The benchmark needs psutil and orjson: pip install 'megapoly[data]'\n"
    assert run("benchmark", "preprocess") == (2, expected)


def test_missing_packages_of_several_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("psutil", "safetensors", "transformers"):
        monkeypatch.setitem(sys.modules, module, None)
    expected = "psutil, safetensors and transformers: pip install 'megapoly[train,hf]'"
    assert run("export")[1] == f"megapoly export needs {expected}\n"


def test_a_package_that_is_found_missing_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a benchmark, which needs the engine only if it is one of training."""

    def fails(argv: Sequence[str]) -> int:
        raise ModuleNotFoundError("No module named 'lm_eval.api'", name=missing)

    monkeypatch.setattr(benchmark, "main", fails)
    missing = "lm_eval"
    expected = "megapoly benchmark needs lm-eval: pip install 'megapoly[eval]'\n"
    assert run("benchmark", "training") == (2, expected)
    missing = "megatron"
    assert "needs megatron-core: pip" in run("benchmark", "training")[1]
    missing = "megapoly.no_such_module"
    with pytest.raises(ModuleNotFoundError):
        run("benchmark", "training")


def test_what_commands_need_is_what_the_extras_install() -> None:
    setup = (Path(__file__).parents[2] / "setup.py").read_text()
    for modules in extras.EXTRAS.values():
        for module in modules:
            assert re.search(rf'"{extras.DISTRIBUTIONS.get(module, module)}[">]', setup), module
    for command in COMMANDS.values():
        for extra, modules in command.needs.items():
            assert {*modules} <= {*extras.EXTRAS[extra]} and command.missing() == {}


def test_the_doctor_lists_what_can_run() -> None:
    """Without the engine; the other checks are those of tests/preflight/doctor."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "megatron", None)
        patch.delitem(sys.modules, "megatron.core", raising=False)
        missing = {name: command.missing() for name, command in COMMANDS.items()}
        can_run, *cannot = doctor.command_lines(missing)
    able = (
        "Commands that can run: preprocess, evaluate, generate, copy, verify, status, plan, doctor"
    )
    assert can_run.startswith(able)
    assert cannot == [
        "train, export, import, check-parallel, soak, compare cannot run without megatron-core: "
        "pip install 'megapoly[train]'"
    ]


@pytest.mark.parametrize("command", ["plan", "evaluate", "doctor"])
def test_variables_of_a_launcher_that_cannot_be_used(command, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "x")
    assert main([command]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"megapoly {command}: `RANK` (x) is not a whole number")
    assert len(error.splitlines()) == 1
