"""Read YAML text of recipes and of the command line.

PyYAML's safe loader, for YAML 1.1, with these differences: ``3e-4`` is a number; ``010`` (8 in YAML
1.1, 10 in YAML 1.2) and ``1:30`` (90 in YAML 1.1) are text, which no option of numbers accepts;
aliases may neither hold themselves nor expand without limit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

# Of a recipe; one with a thousand sources has about 100 kB. PyYAML reads about 100 kB per second.
LARGEST_FILE_BYTES = 1 << 20
# With every alias replaced by what it stands for.
MOST_VALUES = 100_000
_MOST_DIGITS = 1000  # Python converts at most 4,300 digits to a number or back

_INT = re.compile(r"[-+]?(?:0|[1-9][0-9_]*)|[-+]?0x[0-9a-fA-F_]+|[-+]?0b[01_]+")
_FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
# Numbers of YAML 1.1 that YAML 1.2 reads differently.
AMBIGUOUS = re.compile(r"[-+]?0[0-9_]+|[-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?")
# What PyYAML raises for a value that its tag does not fit: `2026-13-45`, `!!float x`.
DOES_NOT_FIT = (ValueError, LookupError, AttributeError, TypeError, OverflowError)


class _Loader(yaml.SafeLoader):
    """The safe loader with the numbers above."""

    yaml_implicit_resolvers = {
        first: [(tag, regex) for tag, regex in resolvers if not tag.endswith((":int", ":float"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_number(self, node: yaml.ScalarNode) -> int | str:
        """Return a whole number; its text if it is one of digits without end."""
        if not _INT.fullmatch(node.value):
            raise yaml.constructor.ConstructorError(
                None, None, f"{node.value[:80]!r} is not a whole number", node.start_mark
            )
        if len(node.value) > _MOST_DIGITS:
            return str(node.value)
        return int(node.value.replace("_", ""), 0)


for _tag, _regex in (("int", _INT), ("float", _FLOAT)):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_regex.pattern})\Z"), list("-+.0123456789")
    )
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_number)


def read_yaml(text: str) -> Any:
    """Return the value of YAML text.

    Raises:
        yaml.YAMLError: it is not YAML, nests too deeply, or its aliases have no end.
    """
    return parse_yaml(text)[1]


def parse_yaml(text: str) -> tuple[yaml.Node | None, Any]:
    """Return the nodes of YAML text, which know their lines, and its value.

    Raises:
        yaml.YAMLError: see :func:`read_yaml`.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, None
        if _num_values(node, {}) > MOST_VALUES:
            raise yaml.YAMLError(f"its aliases stand for more than {MOST_VALUES:,} values")
        return node, loader.construct_document(node)
    except RecursionError:
        raise yaml.YAMLError("its values nest too deeply") from None
    except DOES_NOT_FIT as error:
        raise yaml.YAMLError(f"a value does not fit its tag: {error}") from error
    finally:
        loader.dispose()


def _num_values(node: yaml.Node, known: dict[yaml.Node, int | None]) -> int:
    """Return how many values a node holds, itself included; ``known`` has what was counted."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if node not in known:
        known[node] = None
        known[node] = 1 + sum(_num_values(child, known) for child in _children(node))
    found = known[node]
    if found is None:
        line = node.start_mark.line + 1
        raise yaml.YAMLError(f"the value that begins at line {line} holds itself by an alias")
    return found


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    for child in node.value:
        yield from child if isinstance(node, yaml.MappingNode) else [child]


def repeated_keys(node: yaml.Node | None, path: Path) -> Iterator[str]:
    """Yield a problem for each key that is twice in one mapping: YAML would drop the first."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from repeated_keys(item, path)
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if key.value in lines:
            yield (
                f"`{key.value}` is twice in {path}, lines {lines[key.value]} and {line}; keep one"
            )
        lines[key.value] = line
        yield from repeated_keys(value, path)


def read_file(path: Path) -> str:
    """Return the text of a YAML file.

    Raises:
        OSError: it cannot be read.
        ValueError: its name cannot be one, it is not UTF-8, or it is larger than a recipe.
    """
    with path.open("rb") as file:  # may be endless, such as a device
        content = file.read(LARGEST_FILE_BYTES + 1)
    if len(content) > LARGEST_FILE_BYTES:
        raise ValueError(f"it has more than {LARGEST_FILE_BYTES >> 20} MiB")
    return content.decode("utf-8")
