"""From recipe and command line to a :class:`~megapoly.config.schema.Config`, and back to YAML.

A recipe is a YAML file with the schema's sections. ``--section.field value`` on the command line
overrides the recipe. All unknown keys and values of the wrong type are reported at once.
"""

from __future__ import annotations

from argparse import SUPPRESS, RawDescriptionHelpFormatter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from textwrap import fill
from typing import Any, get_origin

import yaml
from jsonargparse import ArgumentParser

from megapoly.config.options import (
    OPTIONS,
    SECTIONS,
    Option,
    nearest,
    options_of,
    short,
    text_of,
    unknown,
)
from megapoly.config.ranges import LARGEST_WORLD_SIZE, Range, whole_number
from megapoly.config.recipes import recipe_names, recipe_path
from megapoly.config.schema import Config
from megapoly.config.typed_values import convert, convert_text
from megapoly.config.yaml_text import parse_yaml, read_file, read_yaml, repeated_keys
from megapoly.errors import ConfigError
from megapoly.platform.gpus import GPUS

# Two forms of one quantity: setting one in a later source replaces the other of an earlier source.
STEP_AND_TOKEN_FORMS = (
    ("training.train_iters", "training.train_tokens"),
    ("optimizer.lr_warmup_iters", "optimizer.lr_warmup_tokens"),
    ("optimizer.lr_decay_iters", "optimizer.lr_decay_tokens"),
    ("optimizer.lr_wsd_decay_iters", "optimizer.lr_wsd_decay_tokens"),
)


@dataclass(frozen=True)
class DryRunOptions:
    """The job that a dry run builds.

    Args:
        world_size: ranks of the job; None: as many as this job has.
        gpu: what the job is meant to run on, by its name in ``megapoly/platform/gpus.py``.
    """

    world_size: int | None = None
    gpu: str = "a100-80g"


@dataclass(frozen=True)
class Arguments:
    """A parsed command line.

    Args:
        config: recipe and overrides, not resolved.
        print_config: print the resolved configuration instead of training.
        dry_run: build the ranks of a job without data instead of training; None: train.
    """

    config: Config
    print_config: bool
    dry_run: DryRunOptions | None = None


def parse(argv: Sequence[str], *, default_recipe: str | Path, program: str) -> Arguments:
    """Read a command line; ``--help`` prints the options and exits.

    Args:
        argv: arguments after the program's name: ``--config RECIPE``, a name or a YAML file
            (several: later ones override earlier ones), ``--section.field value`` or
            ``--section.field=value``, ``--print-config``, ``--dry-run`` with ``--world-size`` and
            ``--gpu``, ``--help``.
        default_recipe: name or path of the recipe if ``argv`` has no ``--config``.
        program: name to show in the help.

    Returns:
        The configuration, in which a number of steps given on the command line replaces the
        recipe's number of tokens, and the other way round.

    Raises:
        ConfigError: all unknown keys, missing files and values of the wrong type.
    """
    given = _split(argv)
    if given.help:
        print(help_text(program, default_recipe), end="")
        raise SystemExit(0)
    problems = list(given.problems)
    values: dict[str, Any] = {}
    for recipe in given.recipes or [str(default_recipe)]:
        try:
            path = recipe_path(recipe)
        except ConfigError as error:
            problems += error.problems
        else:
            values = _merge(values, _read_recipe(path, problems))
    values = _merge(values, _read_overrides(given.overrides, problems))
    dry_run = _dry_run_options(given, problems)
    if problems:
        raise ConfigError(problems)
    return Arguments(_build(values), given.print_config, dry_run)


def override(config: Config, arguments: Sequence[str]) -> list[str]:
    """Set options of a configuration from a command line, in place.

    Args:
        config: changed.
        arguments: ``--section.field value`` or ``--section.field=value``.

    Returns:
        Dotted names of the options that were set.

    Raises:
        ConfigError: all unknown keys and values of the wrong type.
    """
    given = _split(arguments)
    problems = list(given.problems)
    if given.recipes or given.print_config or given.help or given.dry_run or given.of_dry_run:
        problems.append(
            "`--config`, `--print-config`, `--dry-run` and its options, and `--help` are not "
            "options of the configuration; leave them out"
        )
    values = _read_overrides(given.overrides, problems)
    if problems:
        raise ConfigError(problems)
    _set(config, values)
    return list(values)


def load_yaml(path: Path) -> Config:
    """Read one recipe or saved configuration.

    Args:
        path: a YAML file with the schema's sections; absent options keep their defaults.

    Raises:
        ConfigError: as :func:`parse`.
    """
    problems: list[str] = []
    values = _read_recipe(path, problems)
    if problems:
        raise ConfigError(problems)
    return _build(values)


def load_recipe(name: str | Path) -> Config:
    """Read a recipe by its name or path.

    Args:
        name: of an installed recipe, such as ``moe_tiny``, or path of a YAML file.

    Returns:
        The configuration, not resolved; absent options keep their defaults.

    Raises:
        ConfigError: there is no such recipe; or as :func:`parse`.
    """
    return load_yaml(recipe_path(name))


def to_dict(config: Config) -> dict[str, Any]:
    """Return the configuration as nested dictionaries of plain values, in the schema's order.

    Nulls of sources and validation sets are left out: a source has one of three amounts.
    """
    plain = asdict(config)
    data = plain["data"]
    if data["blend"] is not None:
        data["blend"] = [_without_nulls(source) for source in data["blend"]]
    if data["validation"] is not None:
        data["validation"] = {k: _without_nulls(item) for k, item in data["validation"].items()}
    return plain


def _without_nulls(entry: Any) -> Any:
    if not isinstance(entry, dict):
        return entry
    return {key: value for key, value in entry.items() if value is not None}


def to_yaml(config: Config) -> str:
    """Return the configuration as YAML that :func:`load_yaml` reads back to an equal one."""
    return yaml.dump(to_dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def help_text(program: str, default_recipe: str | Path) -> str:
    """Return the usage, and every option with its meaning, choices and default."""
    return str(option_parser(program, default_recipe).format_help())


def option_parser(program: str, default_recipe: str | Path) -> ArgumentParser:
    """Return a parser that has every option, for help, completion and documentation."""
    parser = ArgumentParser(
        prog=program,
        usage=f"{program} [--config RECIPE] [--SECTION.FIELD VALUE ...]",
        formatter_class=RawDescriptionHelpFormatter,
        description=fill(
            f"Without --config the recipe is {default_recipe}. Options of the command line "
            "override the recipe's. Lists are written '[a, b]', no value is written null.",
            width=100,
        ),
    )
    parser.add_argument(
        "--config",
        metavar="RECIPE",
        default=SUPPRESS,
        help=f"a YAML file, or a recipe by name: {', '.join(recipe_names())}; given several times, "
        "later ones override earlier ones",
    )
    parser.add_argument(
        "--print-config",
        action="store_true",
        default=SUPPRESS,
        help="print the resolved configuration and exit",
    )
    dry_run = parser.add_argument_group(
        "dry run: build the model of every distinct rank of a job on this CPU, without data or "
        "other processes, compare the ranks with the whole model, and exit"
    )
    dry_run.add_argument("--dry-run", action="store_true", default=SUPPRESS, help="make a dry run")
    dry_run.add_argument(
        "--world-size",
        metavar="VALUE",
        type=int,
        default=SUPPRESS,
        help="ranks of the job (default: WORLD_SIZE, which torchrun sets, or 1)",
    )
    dry_run.add_argument(
        "--gpu",
        metavar="VALUE",
        default=DryRunOptions.gpu,
        help=f"GPU that each rank is meant to run on: {', '.join(GPUS)}",
    )
    groups = {
        name: parser.add_argument_group(f"{name}: {title[0].lower()}{title[1:].rstrip('.')}")
        for name, title in SECTIONS.items()
    }
    for key, option in OPTIONS.items():
        group = groups.get(key.rpartition(".")[0], parser)
        group.add_argument(
            f"--{key}",
            # jsonargparse would make options of the fields of a dataclass in the type.
            type=option.type if option.entry is None else get_origin(option.base),
            default=option.default,
            metavar="VALUE" if option.choices is None else f"{{{','.join(option.choices)}}}",
            help=_description(option).replace("``", "`").replace("%", "%%"),
        )
    return parser


def _description(option: Option) -> str:
    """Return what an option means, its default, and the keys of a mapping that it may hold."""
    description = f"{option.description} Default: {text_of(option.default)}."
    if option.entry is None:
        return description
    keys = "; ".join(
        f"``{name}``: {field.description.rstrip('.')}"
        for name, field in options_of(option.entry).items()
    )
    return f"{description} Keys of a mapping are {keys}."


@dataclass
class _GivenArguments:
    """A command line, split into its kinds of arguments."""

    recipes: list[str] = field(default_factory=list)
    overrides: list[tuple[str, str | None]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    print_config: bool = False
    dry_run: bool = False
    of_dry_run: dict[str, str | None] = field(default_factory=dict)
    help: bool = False


_OF_DRY_RUN = ("world-size", "gpu")
# Flags of `megapoly train` that are not fields of the configuration.
FLAGS = (
    "--config",
    "--print-config",
    "--dry-run",
    "--world-size",
    "--gpu",
    "--nproc-per-node",
    "--help",
)


def _split(argv: Sequence[str]) -> _GivenArguments:
    given, pending = _GivenArguments(), list(argv)
    while pending:
        argument = pending.pop(0)
        key, equals, text = argument.removeprefix("--").partition("=")
        if argument in ("-h", "--help"):
            given.help = True
        elif argument in ("--print-config", "--print_config"):
            given.print_config = True
        elif argument in ("--dry-run", "--dry_run"):
            given.dry_run = True
        elif not argument.startswith("--"):
            hint = "write `--section.field value`, a list as '[a, b]'"
            if argument in recipe_names() or argument.endswith((".yaml", ".yml")):
                hint = f"write `--config {argument}`"
            elif argument.startswith("-"):
                hint = f"the nearest is `{nearest(short(argument), FLAGS)}`"
            given.problems.append(f"`{short(argument)}` is not an option; {hint}")
        else:
            follows = bool(pending) and not pending[0].startswith("--")
            value = text if equals else pending.pop(0) if follows else None
            if key.replace("_", "-") in _OF_DRY_RUN:
                given.of_dry_run[key.replace("_", "-")] = value
            elif key != "config":
                given.overrides.append((key, value))
            elif value:
                given.recipes.append(value)
            else:
                given.problems.append(
                    "`--config` needs a file or a recipe, such as `--config moe_tiny`"
                )
    return given


def _dry_run_options(given: _GivenArguments, problems: list[str]) -> DryRunOptions | None:
    """Return the options of a dry run; append what is wrong to ``problems``."""
    if given.dry_run and given.print_config:
        problems.append("`--dry-run` and `--print-config` exclude each other; choose one")
    if given.of_dry_run and not given.dry_run:
        names = " and ".join(f"`--{name}`" for name in given.of_dry_run)
        have = "have" if len(given.of_dry_run) > 1 else "has"
        problems.append(
            f"{names} {have} no effect without `--dry-run`; add `--dry-run`, or remove {names}"
        )
    size, gpu = given.of_dry_run.get("world-size", "1"), given.of_dry_run.get("gpu", "none")
    num_ranks = whole_number(size or "", Range(1, LARGEST_WORLD_SIZE))
    if num_ranks is None:
        problems.append(
            f"`--world-size` ({short(size or '')}) must be a number of ranks, 1 to "
            f"{LARGEST_WORLD_SIZE}"
        )
        return None
    if gpu is None:
        problems.append(f"`--gpu` needs a name: {', '.join(GPUS)}")
        return None
    if not given.dry_run:
        return None
    return DryRunOptions(
        world_size=num_ranks if "world-size" in given.of_dry_run else None,
        gpu=gpu if "gpu" in given.of_dry_run else DryRunOptions.gpu,
    )


def _read_overrides(
    overrides: Sequence[tuple[str, str | None]], problems: list[str]
) -> dict[str, Any]:
    """Return values by dotted name; append what is wrong to ``problems``."""
    values = {}
    for key, text in overrides:
        option = OPTIONS.get(key)
        if option is None:
            problems.append(unknown(key, flags=FLAGS if "." not in key else ()))
        elif text is None:
            problems.append(f"`--{key}` needs a value: {option.expected}")
        else:
            try:
                values[key] = convert_text(option, text)
            except ConfigError as error:
                problems += error.problems
    return values


def _read_recipe(path: Path, problems: list[str]) -> dict[str, Any]:
    """Return values of a YAML file by dotted name; append what is wrong to ``problems``."""
    try:
        nodes, document = parse_yaml(read_file(path))
        problems += repeated_keys(nodes, path)
    except (OSError, ValueError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or error
        problems.append(
            f"the recipe `{short(path)}` cannot be read ({reason}); name a YAML file, or one of "
            f"{', '.join(recipe_names())}"
        )
        return {}
    except yaml.YAMLError as error:
        problems.append(f"the recipe `{path}` is not YAML: {' '.join(str(error).split())}")
        return {}
    if not isinstance(document, Mapping | None):
        problems.append(f"the recipe `{path}` must hold sections, such as `model:` with options")
        return {}
    values = {}
    for key, value in _flatten(document or {}):
        option = OPTIONS.get(key)
        if option is None:
            problems.append(unknown(key, f" in {path}"))
            continue
        try:
            values[key] = convert(option, value)
        except ConfigError as error:
            problems += [f"{problem} ({path})" for problem in error.problems]
    return values


def _flatten(document: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """Yield dotted names and values; a section without options (``model:``) has none."""
    for name, value in document.items():
        if name not in SECTIONS or value is not None and not isinstance(value, Mapping):
            yield str(name), value
        else:
            yield from ((f"{name}.{inner}", item) for inner, item in (value or {}).items())


def _merge(earlier: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two sources; the later one overrides the earlier, also across steps and tokens."""
    replaced: set[str] = set()
    for forms in STEP_AND_TOKEN_FORMS:
        if any(later.get(form) is not None for form in forms):
            replaced.update(forms)
    return {key: value for key, value in earlier.items() if key not in replaced} | dict(later)


def _build(values: Mapping[str, Any]) -> Config:
    config = Config()
    _set(config, values)
    return config


def _set(config: Config, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        setattr(getattr(config, section) if section else config, name, value)


class _Dumper(yaml.SafeDumper):
    """A dumper that quotes text which would be read back as another value, such as ``1e3``."""

    def represent_text(self, value: str) -> yaml.ScalarNode:
        try:
            plain = read_yaml(value) == value
        except yaml.YAMLError:
            plain = False
        return self.represent_scalar("tag:yaml.org,2002:str", value, style=None if plain else "'")


_Dumper.add_representer(str, _Dumper.represent_text)
