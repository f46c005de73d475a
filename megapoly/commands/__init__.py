"""The commands of ``megapoly``, by name: ``megapoly train``, ``python -m megapoly plan``.

Each is a module with ``main(argv) -> exit status`` and ``build_parser()``. It is imported when its
command runs, so that ``megapoly --help`` answers at once.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import ParamSpec

from megapoly.errors import LaunchError
from megapoly.platform import extras, launcher
from megapoly.platform.logs import discard_output
from megapoly.platform.processes import die_with_parent

P = ParamSpec("P")

_ENGINE = {"train": extras.EXTRAS["train"]}
_HUGGING_FACE = {"hf": extras.EXTRAS["hf"]}
_FIGURES = {"report": ("matplotlib",)}


@dataclass(frozen=True)
class Command:
    """One command of ``megapoly``.

    Args:
        module: below :mod:`megapoly.commands`.
        summary: one line for ``megapoly --help``.
        needs: modules without which the command cannot run, by the extra that installs them. What
            only some options need is reported when its import fails.
        takes_overrides: whether ``--section.field value`` sets options of the configuration.
        handles_signals: whether the command handles SIGTERM and Ctrl-C; others end as errors do.
    """

    module: str
    summary: str
    needs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    takes_overrides: bool = False
    handles_signals: bool = False

    def missing(self) -> dict[str, list[str]]:
        """Return the modules that the command needs and that are not installed, by extra."""
        found = {extra: extras.missing(modules) for extra, modules in self.needs.items()}
        return {extra: modules for extra, modules in found.items() if modules}


COMMANDS = {
    "train": Command(
        "train",
        "pre-train a model, or resume a run",
        needs=_ENGINE,
        takes_overrides=True,
        handles_signals=True,
    ),
    "preprocess": Command(
        "preprocess",
        "turn text into token files",
        needs={"data": ("tokenizers",)},
        handles_signals=True,
    ),
    "export": Command(
        "export", "write a checkpoint as a Hugging Face folder", needs=_ENGINE | _HUGGING_FACE
    ),
    "import": Command(
        "import_", "write a Hugging Face folder as a checkpoint", needs=_ENGINE | _HUGGING_FACE
    ),
    "evaluate": Command(
        "evaluate",
        "run benchmarks, or measure perplexity by domain",
        needs={"eval": ("tokenizers",)},
        takes_overrides=True,
    ),
    "generate": Command("generate", "let a model continue a text", needs=_HUGGING_FACE),
    "copy": Command("copy", "copy a checkpoint to an object store, or from one, verified"),
    "verify": Command("verify", "compare the files of checkpoints with their CRC-32"),
    "status": Command("status", "show how runs are, and whether they still advance"),
    "plan": Command(
        "plan",
        "estimate memory, communication and time of a job",
        needs={"train": ("tokenizers",)},
        takes_overrides=True,
    ),
    "doctor": Command("doctor", "check what is installed on this machine"),
    "check-parallel": Command(
        "check_parallel",
        "compare parallel layouts with one process",
        needs=_ENGINE,
        takes_overrides=True,
    ),
    "soak": Command(
        "soak",
        "let faults strike a job, and compare it with an uninterrupted run",
        needs=_ENGINE,
        takes_overrides=True,
    ),
    "compare": Command(
        "compare",
        "train the same model with several activations",
        needs=_ENGINE | {"report": ("scipy",)},  # intervals of its table
        takes_overrides=True,
    ),
    "analyze": Command(
        "analyze", "look inside a trained model", needs=_FIGURES, takes_overrides=True
    ),
    "report": Command(
        "report",
        "write one page of tables and figures from any set of runs",
        needs={"report": extras.EXTRAS["report"]},
    ),
    "theory": Command("theory", "build the paper's theorems and measure them", needs=_FIGURES),
    "benchmark": Command("benchmark", "measure operators, training or preprocessing"),
    "launch": Command("launch", "torchrun with meaningful exit statuses", handles_signals=True),
    "prepare-domains": Command(
        "prepare_domains",
        "tokenizer and token files of several domains",
        needs={"data": ("orjson", "tokenizers")},
    ),
    "export-benchmarks": Command("export_benchmarks", "write the questions of benchmarks to files"),
    "completion": Command("completion", "print a completion script for your shell"),
}


def ends_with_its_reader(work: Callable[P, int]) -> Callable[P, int]:
    """Let a program end quietly when the reader of its output, such as ``head``, has ended."""

    @functools.wraps(work)
    def quiet(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            try:
                return work(*args, **kwargs)
            finally:
                sys.stdout.flush()  # here, not when the interpreter ends, which prints a traceback
        except BrokenPipeError:
            discard_output()
            return 128 + signal.SIGPIPE

    return quiet


@ends_with_its_reader
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names.

    Returns:
        The command's exit status; 2 when there is no such command; that of SIGPIPE when the reader
        of the output, such as ``head``, has ended.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from megapoly import __version__

        print(f"megapoly {__version__}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; the nearest is `{near[0]}`" if near else ""
        print(
            f"megapoly: `{name}` is not a command{hint}. `megapoly --help` lists all commands.",
            file=sys.stderr,
        )
        return 2
    return run(name, rest)


@ends_with_its_reader
def run(name: str, argv: Sequence[str]) -> int:
    """Run a command by its name.

    Returns:
        The command's exit status; 2, with a message, when a package of an extra is missing or a
        launcher's variables cannot be used; that of SIGPIPE as of :func:`main`.
    """
    command = COMMANDS[name]
    if launcher.is_torchrun():
        die_with_parent()
    wants_help = not {"-h", "--help"}.isdisjoint(argv)
    try:
        launcher.check(with_address=False)
    except LaunchError as error:
        print(f"megapoly {name}: {error}", file=sys.stderr)
        return 2
    if not wants_help and (absent := command.missing()):
        print(f"megapoly {name} needs {extras.with_remedy(absent)}", file=sys.stderr)
        return 2
    work: Callable[[], int] = lambda: module_of(name).main(argv)  # noqa: E731
    try:
        return work() if command.handles_signals else end_on_signals(work)
    except ModuleNotFoundError as error:
        found = extras.extra_of(error.name or "", preferred=command.needs)
        if found is None:
            raise
        extra, module = found
        print(f"megapoly {name} needs {extras.with_remedy({extra: [module]})}", file=sys.stderr)
        return 2


def end_on_signals(work: Callable[[], int]) -> int:
    """Run ``work``; SIGTERM and Ctrl-C end it as errors do, so that it cleans up.

    Returns:
        The exit status of ``work``, or 128 and the signal's number, as a shell reports it.
    """
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        return work()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 128 + signal.SIGINT


def module_of(name: str) -> ModuleType:
    """Import and return the module of a command."""
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
