"""Convert values of YAML and of the command line to the types of the schema."""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any, get_args, get_origin

from jsonargparse import ArgumentError, ArgumentParser, get_loader

from megapoly.config.options import Option, members_of, options_of
from megapoly.errors import ConfigError

_TEXT = "text: quote what reads as a number, a date or a truth value"
_PATH = "the prefix of a .bin/.idx pair"


def read_yaml(text: str) -> Any:
    """Return the value of YAML text; ``3e-4`` is a number, unlike in YAML 1.1."""
    return get_loader("yaml")(text)


def convert(option: Option, value: Any) -> Any:
    """Convert a value to the type of its option.

    Args:
        option: the option.
        value: as read from YAML; a whole number may be written ``250e9``.

    Raises:
        ConfigError: the value has another type; each message names the option, the value and what
            is expected. A list of sources may have several mistakes.
    """
    if value is None and option.nullable:
        return None
    if option.base is str and isinstance(value, str):
        return value
    if option.entry is not None:
        return _convert_entries(option, option.entry, value)
    whole = isinstance(value, float) and value.is_integer()
    try:
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError
        parsed = _parser_of_one(option.type).parse_object(
            {"value": int(value) if whole and option.base is int else value}, defaults=False
        )
    except (ArgumentError, ValueError):
        raise ConfigError([_wrong_type(option, value)]) from None
    return parsed["value"]


def convert_text(option: Option, text: str) -> Any:
    """Convert text of the command line to the type of its option.

    Args:
        option: the option.
        text: used as it is for a text option, read as YAML for every other.

    Raises:
        ConfigError: as :func:`convert`.
    """
    if option.base is str:
        return None if option.nullable and text == "null" else text
    try:
        value = read_yaml(text)
    except Exception:  # The loader's errors share no base class; the text is not a value then.
        value = text
    return convert(option, value)


def _wrong_type(option: Option, value: Any) -> str:
    shown = "null" if value is None else repr(value)
    return f"`{option.key}` is {shown}; it must be {option.expected}"


def _convert_entries(option: Option, entry: type, value: Any) -> Any:
    """Convert a list or dictionary of which mappings become ``entry``."""
    is_named = get_origin(option.base) is dict
    if not isinstance(value, Mapping if is_named else list):
        raise ConfigError([_wrong_type(option, value)])
    problems: list[str] = []
    converted = {}
    items = value.items() if isinstance(value, Mapping) else enumerate(value, start=1)
    for key, item in items:
        if is_named and not isinstance(key, str):
            problems.append(f"`{option.key}` names a set {key!r}; a name must be {_TEXT}")
        name = key if is_named else _name_of_source(item, key)
        try:
            converted[key] = _convert_entry(
                option, entry, f"entry `{name}` of `{option.key}`", item
            )
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return converted if is_named else list(converted.values())


def _convert_entry(option: Option, entry: type, label: str, item: Any) -> Any:
    if isinstance(item, Mapping):
        return _convert_mapping(entry, item, label)
    if isinstance(item, str):
        return item
    may_be_list = list[str] in members_of(get_args(option.base)[-1])
    if may_be_list and isinstance(item, list) and all(isinstance(text, str) for text in item):
        return item
    valid = "a prefix, a list of prefixes" if may_be_list else "a prefix"
    shown = "null" if item is None else repr(item)
    raise ConfigError([f"{label} is {shown}; it must be {valid} or a mapping with a `path`"])


def _name_of_source(item: Any, number: int) -> Any:
    """Return the name, path or number by which a message names an entry."""
    return (isinstance(item, Mapping) and (item.get("name") or item.get("path"))) or number


def _convert_mapping(entry: type, item: Mapping[Any, Any], label: str) -> Any:
    """Convert a mapping to the dataclass ``entry``."""
    fields = options_of(entry)
    problems = list(_unknown_keys(fields, item, label))
    if "path" not in item:
        problems.append(f"{label} has no `path`; give {_PATH}")
    values = {}
    for key, value in item.items():
        if key in fields:
            try:
                values[key] = convert(fields[key], value)
            except ConfigError as error:
                problems += [f"{problem} ({label})" for problem in error.problems]
    if problems:
        raise ConfigError(problems)
    return entry(**values)


def _unknown_keys(
    fields: Mapping[str, Option], item: Mapping[Any, Any], label: str
) -> Iterator[str]:
    for key in item:
        if key not in fields:
            (nearest,) = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.0)
            yield (
                f"unknown key `{key}` in {label}; the nearest is `{nearest}`, of "
                f"{', '.join(fields)}"
            )


@functools.cache
def _parser_of_one(hint: Any) -> ArgumentParser:
    """Return a parser of one option, so that every wrong value can be reported."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    return parser
