"""The options that the schema defines: their names, types, defaults, descriptions and checks."""

from __future__ import annotations

import difflib
import functools
import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import docstring_parser
from jsonargparse import ArgumentError, ArgumentParser, get_loader

from megapoly.config.schema import Config

EXPECTED = {
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    str: "text (in YAML, quote what reads as a number, a date or a truth value)",
    list: "a list such as [a, b]",
    dict: "named lists such as {name: [a, b]}",
}


@dataclass(frozen=True)
class Option:
    """One field of the schema.

    Args:
        key: dotted name, ``model.num_layers``; fields of the run itself have no dot.
        type: type in the schema.
        default: value when nothing sets it.
        description: sentence in the schema's docstring.
    """

    key: str
    type: Any
    default: Any
    description: str

    @property
    def nullable(self) -> bool:
        """Whether null is a value of its own."""
        return type(None) in get_args(self.type)

    @property
    def base(self) -> Any:
        """Type without null: ``int`` of ``int | None``."""
        if get_origin(self.type) not in (Union, types.UnionType):
            return self.type
        (base,) = (member for member in get_args(self.type) if member is not type(None))
        return base

    @property
    def expected(self) -> str:
        """What a value has to be, in words."""
        items = get_args(self.base)
        if get_origin(self.base) is Literal:
            words = "one of " + ", ".join(map(str, items))
        elif items and get_origin(items[0]) is Literal:
            words = "a list of " + ", ".join(map(str, get_args(items[0])))
        else:
            words = EXPECTED[get_origin(self.base) or self.base]
        return f"{words}, or null" if self.nullable else words


def read_yaml(text: str) -> Any:
    """The value that YAML text stands for; ``3e-4`` is a number, unlike in YAML 1.1."""
    return get_loader("yaml")(text)


def convert(option: Option, value: Any) -> Any:
    """The value in the type of its option.

    Args:
        option: what is set.
        value: as YAML gives it; a whole number may be written ``250e9``.

    Raises:
        ValueError: it has another type; the message names option, value and what is expected.
    """
    if value is None and option.nullable:
        return None
    if option.base is str and isinstance(value, str):
        return value
    whole = isinstance(value, float) and value.is_integer()
    try:
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError
        parsed = _parser_of_one(option.key).parse_object(
            {"value": int(value) if whole and option.base is int else value}, defaults=False
        )
    except (ArgumentError, ValueError):
        shown = "null" if value is None else repr(value)
        raise ValueError(f"`{option.key}` is {shown}; it must be {option.expected}") from None
    return parsed["value"]


def convert_text(option: Option, text: str) -> Any:
    """The value of an option given as text on the command line.

    Args:
        option: what is set.
        text: taken as it stands for a text option, read as YAML for every other.

    Raises:
        ValueError: as :func:`convert`.
    """
    if option.base is str:
        return None if option.nullable and text == "null" else text
    try:
        value = read_yaml(text)
    except Exception:  # The loader's own errors share no base class; the text is no value then.
        value = text
    return convert(option, value)


def unknown(key: str, place: str = "") -> str:
    """Message about a key that is no option; names the nearest option.

    Args:
        key: dotted name as it was written.
        place: where it was written, such as `` in recipe.yaml``.
    """
    if key in SECTIONS:
        return f"`{key}`{place} is a section; set its options, such as `{_first_option(key)}`"
    nearest = max(OPTIONS, key=lambda option: _likeness(key, option))
    return f"unknown option `{key}`{place}; the nearest is `{nearest}`"


def _likeness(key: str, option: str) -> tuple[float, float]:
    """How alike two dotted names are: first the field, then the whole."""
    field_of_key, field_of_option = key.rpartition(".")[2], option.rpartition(".")[2]
    alike = difflib.SequenceMatcher(None, field_of_key.replace("-", "_"), field_of_option).ratio()
    return alike, difflib.SequenceMatcher(None, key, option).ratio()


def _first_option(section: str) -> str:
    return next(key for key in OPTIONS if key.startswith(f"{section}."))


@functools.cache
def _parser_of_one(key: str) -> ArgumentParser:
    """Parser that knows one option, so that every wrong value can be reported, not the first."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=OPTIONS[key].type)
    return parser


def _default(field: Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _options_of(section: type, prefix: str) -> dict[str, Option]:
    """Every option below a dataclass of the schema, in the schema's order."""
    documented = docstring_parser.parse(section.__doc__ or "").params
    descriptions = {entry.arg_name: entry.description or "" for entry in documented}
    hints = get_type_hints(section)
    options: dict[str, Option] = {}
    for field in fields(section):
        key, hint = prefix + field.name, hints[field.name]
        if is_dataclass(hint):
            assert isinstance(hint, type)
            options |= _options_of(hint, f"{key}.")
        else:
            options[key] = Option(key, hint, _default(field), descriptions[field.name])
    return options


def _sections() -> dict[str, str]:
    """Title of every section of the schema."""
    return {
        name: docstring_parser.parse(hint.__doc__ or "").short_description or name
        for name, hint in get_type_hints(Config).items()
        if is_dataclass(hint)
    }


OPTIONS: Mapping[str, Option] = _options_of(Config, "")
SECTIONS: Mapping[str, str] = _sections()
