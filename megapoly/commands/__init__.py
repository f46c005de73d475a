"""The commands of ``megapoly``, by name: ``megapoly train``, ``python -m megapoly plan``.

Each is a module with ``main(argv) -> exit status`` and ``build_parser()``. It is imported when its
command is run, so that ``megapoly --help`` waits for nothing.
"""

from __future__ import annotations

import difflib
import importlib
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType


@dataclass(frozen=True)
class Command:
    """One command of ``megapoly``.

    Args:
        module: below :mod:`megapoly.commands`.
        summary: one line for ``megapoly --help``.
        handles_signals: whether SIGTERM and Ctrl-C are the command's own; others end as errors do.
    """

    module: str
    summary: str
    handles_signals: bool = False


COMMANDS = {
    "train": Command("train", "pre-train a model, or resume a run", handles_signals=True),
    "preprocess": Command("preprocess", "turn text into token files", handles_signals=True),
    "export": Command("export", "write a checkpoint as a Hugging Face folder"),
    "import": Command("import_", "write a Hugging Face folder as a checkpoint"),
    "evaluate": Command("evaluate", "run benchmarks, or measure perplexity by domain"),
    "generate": Command("generate", "let a model continue a text"),
    "plan": Command("plan", "estimate memory, communication and time of a job"),
    "doctor": Command("doctor", "check what is installed on this machine"),
    "check-parallel": Command("check_parallel", "compare parallel layouts with one process"),
    "compare": Command("compare", "train the same model with several activations"),
    "analyze": Command("analyze", "look inside a trained model"),
    "report": Command("report", "write one page of tables and figures from any set of runs"),
    "theory": Command("theory", "build the paper's theorems and measure them"),
    "benchmark": Command("benchmark", "measure operators, training or preprocessing"),
    "launch": Command("launch", "torchrun with meaningful exit statuses", handles_signals=True),
    "prepare-domains": Command("prepare_domains", "tokenizer and token files of several domains"),
    "export-benchmarks": Command("export_benchmarks", "write the questions of benchmarks to files"),
    "completion": Command("completion", "print a completion script for your shell"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names.

    Returns:
        The command's exit status; 2 when there is no such command.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(help_text())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from megapoly import __version__

        print(f"megapoly {__version__}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        nearest = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.0)[0]
        print(
            f"megapoly: `{name}` is not a command; the nearest is `{nearest}`. `megapoly --help` "
            "lists all of them.",
            file=sys.stderr,
        )
        return 2
    return run(name, rest)


def run(name: str, argv: Sequence[str]) -> int:
    """Run a command by its name and return its exit status."""
    work: Callable[[], int] = lambda: module_of(name).main(argv)  # noqa: E731
    return work() if COMMANDS[name].handles_signals else end_on_signals(work)


def end_on_signals(work: Callable[[], int]) -> int:
    """Do a program's work; SIGTERM and Ctrl-C end it as errors do, so that it cleans up.

    Returns:
        The work's exit status, or 128 and the signal's number, as a shell reports it.
    """
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        return work()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 128 + signal.SIGINT


def module_of(name: str) -> ModuleType:
    """Import the module of a command."""
    return importlib.import_module(f"megapoly.commands.{COMMANDS[name].module}")


def help_text() -> str:
    """Return the usage and one line for each command."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: megapoly COMMAND [options]",
            "",
            "Pre-training of PolyCom language models on Megatron-Core.",
            "",
            "commands:",
            *lines,
            "",
            "`megapoly COMMAND --help` describes a command, `megapoly --version` is the version.",
        ]
    )
