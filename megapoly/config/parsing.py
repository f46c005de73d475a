"""From recipe and command line to a :class:`~megapoly.config.schema.Config`, and back to YAML.

A recipe is a YAML file with the schema's sections. ``--section.field value`` on the command line
goes before the recipe. Every unknown key and every value of the wrong type is reported at once.
"""

from __future__ import annotations

from argparse import SUPPRESS
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_origin

import yaml
from jsonargparse import ArgumentParser

from megapoly.config.options import OPTIONS, SECTIONS, Option, options_of, unknown
from megapoly.config.recipes import recipe_names, recipe_path
from megapoly.config.schema import Config
from megapoly.config.typed_values import convert, convert_text, read_yaml
from megapoly.errors import ConfigError

# Two forms of one quantity: setting one in a later source replaces the other of an earlier source.
STEP_AND_TOKEN_FORMS = (
    ("training.train_iters", "training.train_tokens"),
    ("optimizer.lr_warmup_iters", "optimizer.lr_warmup_tokens"),
    ("optimizer.lr_decay_iters", "optimizer.lr_decay_tokens"),
    ("optimizer.lr_wsd_decay_iters", "optimizer.lr_wsd_decay_tokens"),
)


@dataclass(frozen=True)
class DryRunOptions:
    """What a dry run is of.

    Args:
        world_size: ranks of the job; None: as many as this job has.
        gpu: that the job is meant for, as ``megapoly/platform/gpus.py`` names it.
    """

    world_size: int | None = None
    gpu: str = "a100-80g"


@dataclass(frozen=True)
class Arguments:
    """What a command line asks for.

    Args:
        config: recipe and overrides, not resolved.
        print_config: show the resolved configuration instead of running.
        dry_run: build the ranks of a job without data instead of running; None: run.
    """

    config: Config
    print_config: bool
    dry_run: DryRunOptions | None = None


def parse(argv: Sequence[str], *, default_recipe: str | Path, program: str) -> Arguments:
    """Read a command line; ``--help`` prints the options and exits.

    Args:
        argv: words after the program's name: ``--config RECIPE``, a name or a YAML file (several:
            later ones go before earlier ones), ``--section.field value`` or
            ``--section.field=value``, ``--print-config``, ``--dry-run`` with ``--world-size`` and
            ``--gpu``, ``--help``.
        default_recipe: the recipe when ``argv`` names none.
        program: name to show in the help.

    Returns:
        The configuration, in which a number of steps given on the command line replaces the
        recipe's number of tokens, and the other way round.

    Raises:
        ConfigError: all unknown keys, missing files and values of the wrong type.
    """
    words = _split(argv)
    if words.help:
        print(help_text(program, default_recipe), end="")
        raise SystemExit(0)
    problems = list(words.problems)
    values: dict[str, Any] = {}
    for recipe in words.recipes or [str(default_recipe)]:
        try:
            path = recipe_path(recipe)
        except ConfigError as error:
            problems += error.problems
        else:
            values = _merge(values, _read_recipe(path, problems))
    values = _merge(values, _read_overrides(words.overrides, problems))
    dry_run = _dry_run_options(words, problems)
    if problems:
        raise ConfigError(problems)
    return Arguments(_build(values), words.print_config, dry_run)


def override(config: Config, words: Sequence[str]) -> list[str]:
    """Set options of a configuration from a command line, in place.

    Args:
        config: changed.
        words: ``--section.field value`` or ``--section.field=value``.

    Returns:
        Dotted names of what was set.

    Raises:
        ConfigError: all unknown keys and values of the wrong type.
    """
    split = _split(words)
    problems = list(split.problems)
    if split.recipes or split.print_config or split.help or split.dry_run or split.of_dry_run:
        problems.append(
            "`--config`, `--print-config`, `--dry-run` and its options, and `--help` have no place "
            "among overrides"
        )
    values = _read_overrides(split.overrides, problems)
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
    """The configuration as nested dictionaries of plain values, in the schema's order.

    Of sources and validation sets what is null is left out: it is there to be one of three.
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
    """The configuration as YAML that :func:`load_yaml` reads back to an equal one."""
    return yaml.dump(to_dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def help_text(program: str, default_recipe: str | Path) -> str:
    """Usage and every option with its meaning, type and default."""
    return str(option_parser(program, default_recipe).format_help())


def option_parser(program: str, default_recipe: str | Path) -> ArgumentParser:
    """Return a parser that has every option, for help, completion and documentation."""
    parser = ArgumentParser(
        prog=program,
        usage=f"{program} [--config RECIPE] [--SECTION.FIELD VALUE ...]",
        description=f"Without --config the recipe is {default_recipe}. Options of the command line "
        "override the recipe's. Lists are written '[a, b]'; null is no value.",
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
        "dry run: build the model of every distinct rank of a job on this CPU, without data and "
        "other processes, compare the ranks with the whole model and exit"
    )
    dry_run.add_argument("--dry-run", action="store_true", default=SUPPRESS, help="do that")
    dry_run.add_argument(
        "--world-size",
        metavar="VALUE",
        type=int,
        default=SUPPRESS,
        help="ranks of the job (without it as many as WORLD_SIZE says, which torchrun sets)",
    )
    dry_run.add_argument(
        "--gpu",
        metavar="VALUE",
        default=DryRunOptions.gpu,
        help="what each rank is meant to run on, of megapoly/platform/gpus.py",
    )
    groups = {
        name: parser.add_argument_group(f"{name}: {title[0].lower()}{title[1:].rstrip('.')}")
        for name, title in SECTIONS.items()
    }
    for key, option in OPTIONS.items():
        group = groups.get(key.rpartition(".")[0], parser)
        group.add_argument(
            f"--{key}",
            # A dataclass in the type would become options of its own.
            type=option.type if option.entry is None else get_origin(option.base),
            default=option.default,
            metavar="VALUE",
            help=_description(option).replace("``", "`").replace("%", "%%"),
        )
    return parser


def _description(option: Option) -> str:
    """What an option means; with the keys of a mapping that it may hold."""
    if option.entry is None:
        return option.description
    keys = "; ".join(
        f"``{name}``: {field.description.rstrip('.')}"
        for name, field in options_of(option.entry).items()
    )
    return f"{option.description} Keys of a mapping are {keys}."


@dataclass
class _Words:
    """A command line, cut into its parts."""

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


def _split(argv: Sequence[str]) -> _Words:
    words, pending = _Words(), list(argv)
    while pending:
        word = pending.pop(0)
        key, equals, text = word.removeprefix("--").partition("=")
        if word in ("-h", "--help"):
            words.help = True
        elif word in ("--print-config", "--print_config"):
            words.print_config = True
        elif word in ("--dry-run", "--dry_run"):
            words.dry_run = True
        elif not word.startswith("--"):
            words.problems.append(
                f"`{word}` belongs to no option; write `--section.field value`, a list as '[a, b]'"
            )
        else:
            follows = bool(pending) and not pending[0].startswith("--")
            value = text if equals else pending.pop(0) if follows else None
            if key.replace("_", "-") in _OF_DRY_RUN:
                words.of_dry_run[key.replace("_", "-")] = value
            elif key != "config":
                words.overrides.append((key, value))
            elif value:
                words.recipes.append(value)
            else:
                words.problems.append("`--config` needs a file: `--config FILE.yaml`")
    return words


def _dry_run_options(words: _Words, problems: list[str]) -> DryRunOptions | None:
    """Options of a dry run; what is wrong is appended to ``problems``."""
    if words.dry_run and words.print_config:
        problems.append("`--dry-run` and `--print-config` are two things to do; choose one")
    if words.of_dry_run and not words.dry_run:
        names = " and ".join(f"`--{name}`" for name in words.of_dry_run)
        problems.append(
            f"{names}: nothing reads this without `--dry-run`; add that, or leave it out"
        )
    size, gpu = words.of_dry_run.get("world-size", "1"), words.of_dry_run.get("gpu", "none")
    if size is None or not size.isdecimal() or int(size) < 1:
        problems.append(f"`--world-size` ({size or ''}) must be a number of ranks, 1 or more")
        return None
    if gpu is None:
        problems.append("`--gpu` needs a name of `megapoly/platform/gpus.py`, such as a100-80g")
        return None
    if not words.dry_run:
        return None
    return DryRunOptions(
        world_size=int(size) if "world-size" in words.of_dry_run else None,
        gpu=gpu if "gpu" in words.of_dry_run else DryRunOptions.gpu,
    )


def _read_overrides(
    overrides: Sequence[tuple[str, str | None]], problems: list[str]
) -> dict[str, Any]:
    """Values of the command line by dotted name; what is wrong is appended to ``problems``."""
    values = {}
    for key, text in overrides:
        option = OPTIONS.get(key)
        if option is None:
            problems.append(unknown(key, flags=FLAGS))
        elif text is None:
            problems.append(f"`--{key}` needs a value: {option.expected}")
        else:
            try:
                values[key] = convert_text(option, text)
            except ConfigError as error:
                problems += error.problems
    return values


def _read_recipe(path: Path, problems: list[str]) -> dict[str, Any]:
    """Values of a YAML file by dotted name; what is wrong is appended to ``problems``."""
    try:
        text = path.read_text(encoding="utf-8")
        document = read_yaml(text)
        problems += _repeated_keys(yaml.compose(text, Loader=yaml.SafeLoader), path)
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"the recipe `{path}` cannot be read ({error}); name a YAML file")
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
    """Dotted names and values; a section without options (``model:``) has none."""
    for name, value in document.items():
        if name not in SECTIONS or value is not None and not isinstance(value, Mapping):
            yield str(name), value
        else:
            yield from ((f"{name}.{inner}", item) for inner, item in (value or {}).items())


def _repeated_keys(node: yaml.Node | None, path: Path) -> Iterator[str]:
    """Problems with keys that stand twice in one mapping, of which YAML would drop the first."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _repeated_keys(item, path)
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if key.value in lines:
            yield (
                f"`{key.value}` stands twice in {path}, lines {lines[key.value]} and {line}; "
                "keep one"
            )
        lines[key.value] = line
        yield from _repeated_keys(value, path)


def _merge(earlier: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """Both sources, the later one first, also across steps and tokens."""
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
    """Quotes text that :func:`read_yaml` would not read back as that text, such as ``1e3``."""

    def represent_text(self, value: str) -> yaml.ScalarNode:
        try:
            plain = read_yaml(value) == value
        except yaml.YAMLError:
            plain = False
        return self.represent_scalar("tag:yaml.org,2002:str", value, style=None if plain else "'")


_Dumper.add_representer(str, _Dumper.represent_text)
