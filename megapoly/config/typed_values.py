"""Convert values of YAML and of the command line to the types of the schema."""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args, get_origin

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from megapoly.config.options import Option, members_of, options_of, short, shown
from megapoly.config.yaml_text import AMBIGUOUS, DOES_NOT_FIT, read_yaml
from megapoly.errors import ConfigError

_TEXT = "text: quote what reads as a number, a date or a truth value"
_PATH = "the prefix of a .bin/.idx pair"
# A path has at most 4,096 bytes on Linux; nothing else that an option takes is as long.
_LONGEST_TEXT_BYTES = 4096
# Whole numbers of this size and above are refused here, so that all computations with the others
# have an end; `megapoly.config.rules.values` has the range of each option.
_TOO_LARGE = 10**18
_HAS_MANY_DIGITS = "whole numbers have at most 18 digits"


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
    if option.entry is not None:
        return _convert_entries(option, option.entry, value)
    takes_text = not {str, list[str]}.isdisjoint(members_of(option.base))
    if (reason := _never_valid(value, takes_text=takes_text)) is not None:
        raise ConfigError([_wrong_type(option, value, reason)])
    if option.base is str and isinstance(value, str):
        return value
    try:
        parsed = _parser_of_one(option.type).parse_object(
            {"value": _number(option, value)}, defaults=False
        )
    # The type checker reads text of choices and lists as YAML again.
    except (ArgumentError, yaml.YAMLError, RecursionError, *DOES_NOT_FIT):
        raise ConfigError([_wrong_type(option, value)]) from None
    return parsed["value"]


def _never_valid(value: Any, *, takes_text: bool) -> str | None:
    """Return why a value is never valid; None if it may be. ``takes_text``: as a name or path."""
    if isinstance(value, list):
        reasons = (_never_valid(item, takes_text=takes_text) for item in value)
        return next((reason for reason in reasons if reason is not None), None)
    if isinstance(value, int):
        return _HAS_MANY_DIGITS if abs(value) >= _TOO_LARGE else None
    return _not_a_name(value) if takes_text and isinstance(value, str) else None


def _not_a_name(text: str) -> str | None:
    """Return why text can be neither a name nor a path; None if it can."""
    if not text.strip():
        return "it is blank, as a shell variable is that is not set"
    if "\0" in text:
        return "names and paths have no NUL character"
    try:
        too_long = len(text.encode("utf-8")) > _LONGEST_TEXT_BYTES
    except UnicodeEncodeError:
        return "names and paths are valid UTF-8"
    return f"names and paths have at most {_LONGEST_TEXT_BYTES} bytes" if too_long else None


def _number(option: Option, value: Any) -> Any:
    """Return a value of YAML as the type checker takes it.

    Raises:
        ValueError: it is not finite, too large for its type, or text where no text is valid.
    """
    if value is None:
        raise ValueError
    if isinstance(value, list) and option.base == list[int]:
        return [_number(option, item) for item in value]
    if isinstance(value, str) and not _takes_text(option):
        value = read_yaml(value)  # "4" with quotes; the type checker would also read 010, as 8
        if isinstance(value, str):
            raise ValueError
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError
        if option.base is int and value.is_integer():
            if abs(value) >= _TOO_LARGE:
                raise ValueError
            return int(value)
    return value


def convert_text(option: Option, text: str) -> Any:
    """Convert text of the command line to the type of its option.

    Args:
        option: the option.
        text: used as it is for a text option, read as YAML for every other.

    Raises:
        ConfigError: as :func:`convert`.
    """
    if option.base is str:
        return convert(option, None if option.nullable and text == "null" else text)
    try:
        value = read_yaml(text)
    except yaml.YAMLError:
        value = text
    return convert(option, value)


def _takes_text(option: Option) -> bool:
    """Return whether some text is a value of an option that is no list."""
    return any(each is str or get_origin(each) is Literal for each in members_of(option.base))


def _wrong_type(option: Option, value: Any, reason: str | None = None) -> str:
    if reason is None and option.base in (int, float):
        if isinstance(value, str) and AMBIGUOUS.fullmatch(value):
            reason = "YAML 1.1 and 1.2 read it as different numbers: write it in decimal digits"
        elif isinstance(value, float) and abs(value) >= _TOO_LARGE and math.isfinite(value):
            reason = _HAS_MANY_DIGITS
    because = "" if reason is None else f"{reason}; "
    return f"`{option.key}` is {shown(value)}; {because}it must be {option.expected}"


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
            problems.append(f"`{option.key}` names a set {shown(key)}; a name must be {_TEXT}")
        elif isinstance(key, str) and (reason := _not_a_name(key)) is not None:
            problems.append(f"`{option.key}` names a set {shown(key)}; {reason}")
        name = key if is_named else _name_of_source(item, key)
        try:
            converted[key] = _convert_entry(
                option, entry, f"entry `{short(name)}` of `{option.key}`", item
            )
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return converted if is_named else list(converted.values())


def _convert_entry(option: Option, entry: type, label: str, item: Any) -> Any:
    if isinstance(item, Mapping):
        return _convert_mapping(entry, item, label)
    may_be_list = list[str] in members_of(get_args(option.base)[-1])
    is_list = may_be_list and isinstance(item, list) and all(isinstance(text, str) for text in item)
    reason = _never_valid(item, takes_text=True)
    if reason is None and (is_list or isinstance(item, str)):
        return item
    because = "" if reason is None else f"{reason}; "
    valid = "a prefix, a list of prefixes" if may_be_list else "a prefix"
    raise ConfigError(
        [f"{label} is {shown(item)}; {because}it must be {valid} or a mapping with a `path`"]
    )


def _name_of_source(item: Any, number: int) -> Any:
    """Return the name, path or number by which a message names an entry."""
    named = isinstance(item, Mapping) and (item.get("name") or item.get("path"))
    return short(named) if named else number


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
            (nearest,) = difflib.get_close_matches(short(key), fields, n=1, cutoff=0.0)
            yield (
                f"unknown key `{short(key)}` in {label}; the nearest is `{nearest}`, of "
                f"{', '.join(fields)}"
            )


@functools.cache
def _parser_of_one(hint: Any) -> ArgumentParser:
    """Return a parser of one option, so that every wrong value can be reported."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    return parser
