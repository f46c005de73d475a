"""The options that the schema defines: their names, types, defaults and descriptions."""

from __future__ import annotations

import difflib
import reprlib
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import docstring_parser

from megapoly.config.schema import BlendSource, Config, ValidationSet

EXPECTED = {
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    str: "text (in YAML, quote what reads as a number, a date or a truth value)",
    list: "a list such as [a, b]",
    BlendSource: "a list of prefixes and sources such as [a, {path: b, epochs: 2}]",
    ValidationSet: "named sets such as {name: a, other: {path: [b, c], weight: 2}}",
}

_LONGEST_SHOWN = 120
_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = _SHOWN.maxlong = _LONGEST_SHOWN


@dataclass(frozen=True)
class Option:
    """One field of the schema.

    Args:
        key: dotted name, ``model.num_layers``; fields of the run itself have no dot.
        type: type in the schema.
        default: value if it is not set.
        description: sentence in the schema's docstring.
    """

    key: str
    type: Any
    default: Any
    description: str

    @property
    def nullable(self) -> bool:
        """Whether null is a value."""
        return type(None) in get_args(self.type)

    @property
    def base(self) -> Any:
        """Type without null: ``int`` for ``int | None``."""
        members = tuple(member for member in members_of(self.type) if member is not type(None))
        return Union[members]  # noqa: UP007  (of any number, one included)

    @property
    def entry(self) -> type | None:
        """Dataclass of the mappings that its list or dictionary may hold, if any."""
        items = get_args(self.base)[-1:] if get_origin(self.base) in (list, dict) else ()
        members = (member for item in items for member in members_of(item))
        return next((member for member in members if is_dataclass(member)), None)

    @property
    def choices(self) -> list[str] | None:
        """Valid values, as the command line takes them; None: too many to list."""
        choices: list[str] = []
        for member in members_of(self.base):
            if member is not bool and get_origin(member) is not Literal:
                return None
            choices += map(text_of, (True, False) if member is bool else get_args(member))
        return [*choices, "null"] if self.nullable else choices

    @property
    def expected(self) -> str:
        """Description of valid values, for messages."""
        valid = " or ".join(_expected(member) for member in members_of(self.base))
        if self.entry is not None:
            valid = EXPECTED[self.entry]
        return f"{valid}, or null" if self.nullable else valid


def text_of(value: Any) -> str:
    """Return a value as the command line takes it: ``null``, ``true``, ``[a, b]``."""
    if isinstance(value, list):
        return f"[{', '.join(map(text_of, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def short(text: object) -> str:
    """Return text for a message, without the middle of what is very long."""
    full = str(text)
    return full if len(full) <= _LONGEST_SHOWN else f"{full[:80]}...{full[-20:]}"


def shown(value: Any) -> str:
    """Return a value for a message, without most of what is very long or nests deeply."""
    return "null" if value is None else _SHOWN.repr(value)


def members_of(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union, or any other type as the only member."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _expected(hint: Any) -> str:
    items = get_args(hint)
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, items))
    if items and get_origin(items[0]) is Literal:
        return "a list of " + ", ".join(map(str, get_args(items[0])))
    return EXPECTED.get(get_origin(hint) or hint, "")


def unknown(key: str, place: str = "", *, flags: Sequence[str] = ()) -> str:
    """Return the message about a key that is not an option; it names the nearest option.

    Args:
        key: dotted name as it was written.
        place: where it was written, such as `` in recipe.yaml``.
        flags: other flags that the command takes, such as ``--config``.
    """
    key = short(key)
    if key in SECTIONS:
        return f"`{key}`{place} is a section; set its options, such as `{_first_option(key)}`"
    known = [*OPTIONS, *flags, *(SECTIONS if place else ())]
    return f"unknown option `{key}`{place}; the nearest is `{nearest(key, known)}`"


def nearest(name: str, known: Sequence[str]) -> str:
    """Return the known name that is most like a dotted name or a flag."""
    return max(known, key=lambda each: _likeness(_plain(name), _plain(each)))


def _plain(name: str) -> str:
    return name.lstrip("-").replace("-", "_")


def _likeness(name: str, known: str) -> tuple[float, float]:
    """Return how alike two dotted names are: their fields first, then the whole names."""
    fields_of_both = name.rpartition(".")[2], known.rpartition(".")[2]
    alike = difflib.SequenceMatcher(None, *fields_of_both).ratio()
    return alike, difflib.SequenceMatcher(None, name, known).ratio()


def _first_option(section: str) -> str:
    return next(key for key in OPTIONS if key.startswith(f"{section}."))


def _default(field: Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def options_of(section: type, prefix: str = "") -> dict[str, Option]:
    """Return every option below a dataclass of the schema, in the schema's order."""
    documented = docstring_parser.parse(section.__doc__ or "").params
    descriptions = {entry.arg_name: entry.description or "" for entry in documented}
    hints = get_type_hints(section)
    options: dict[str, Option] = {}
    for field in fields(section):
        key, hint = prefix + field.name, hints[field.name]
        if is_dataclass(hint):
            assert isinstance(hint, type)
            options |= options_of(hint, f"{key}.")
        else:
            options[key] = Option(key, hint, _default(field), descriptions[field.name])
    return options


def _sections() -> dict[str, str]:
    """Return the title of every section of the schema."""
    return {
        name: docstring_parser.parse(hint.__doc__ or "").short_description or name
        for name, hint in get_type_hints(Config).items()
        if is_dataclass(hint)
    }


OPTIONS: Mapping[str, Option] = options_of(Config, "")
SECTIONS: Mapping[str, str] = _sections()
