"""Lines of JSON to texts, and what cannot be one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from megapoly.errors import UnavailableError

try:
    import orjson
except ImportError as error:
    raise UnavailableError(
        "The preprocessor needs the package orjson: `pip install '.[data]'`."
    ) from error


@dataclass(frozen=True)
class Oversized:
    """A line that was not kept because it is longer than the limit.

    Args:
        size_bytes: its length.
    """

    size_bytes: int


@dataclass(frozen=True)
class Rejected:
    """A line, row or document that gives no text, or the rest of a damaged file.

    Args:
        row: place in its piece of the file, from 0.
        reason: one of a few, for counting.
        detail: more about this one; may be empty.
        content: the line or value, if it was kept.
        size_bytes: its length.
    """

    row: int
    reason: str
    detail: str
    content: bytes | None
    size_bytes: int

    @property
    def explanation(self) -> str:
        """Reason and detail."""
        return f"{self.reason} ({self.detail})" if self.detail else self.reason


@dataclass
class Block:
    """Some consecutive lines or rows of a file.

    Args:
        texts: for each JSON key its texts; all of the same length.
        rejected: what gave no text.
        num_rows: lines or rows, rejected and blank ones included.
        source_bytes: bytes of the file on disk that were consumed for it.
        position: where a stream can be gone on with after it, see the reader; null: not here.
    """

    texts: list[list[str]]
    rejected: list[Rejected] = field(default_factory=list)
    num_rows: int = 0
    source_bytes: int = 0
    position: int | None = None


class BadRecord(Exception):
    """A record gives no text.

    Args:
        reason: as in :class:`Rejected`.
        detail: as in :class:`Rejected`.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason)
        # A key of the record may hold half of a surrogate pair, which no file can.
        self.reason, self.detail = reason, detail.encode("utf-8", "backslashreplace").decode()


@dataclass(frozen=True)
class RecordRules:
    """What makes a record good.

    Args:
        keys: of the JSON object or columns of the table, each a string.
        keep_empty: whether an empty text is a document of its own.
        max_document_bytes: longest line of JSON, or text in UTF-8.
    """

    keys: tuple[str, ...]
    keep_empty: bool
    max_document_bytes: int

    def too_large(self, size_bytes: int) -> BadRecord:
        """The error for a line or text over the limit."""
        limit = self.max_document_bytes / 2**20
        return BadRecord(
            "longer than --max-document-mib",
            f"{size_bytes / 2**20:.1f} MiB, the limit is {limit:g}",
        )

    def check_text(self, key: str, value: object) -> str:
        """The value as a text.

        Raises:
            BadRecord: it is not a string, or empty.
        """
        if not isinstance(value, str):
            raise BadRecord(f"`{key}` is not a string", _json_type(value))
        if not value and not self.keep_empty:
            raise BadRecord("empty text", f"`{key}`")
        return value


def parse_lines(
    lines: Sequence[bytes | Oversized], first_row: int, rules: RecordRules
) -> tuple[list[list[str]], list[Rejected]]:
    """Texts of lines of JSON, for each key, and the lines that have none.

    Blank lines are neither: many files end with one.
    """
    columns: list[list[str]] = [[] for _ in rules.keys]
    rejected = []
    keys, loads = rules.keys, orjson.loads
    for row, line in enumerate(lines, first_row):
        try:
            record = loads(line)  # type: ignore[arg-type] # Oversized: a TypeError, as for a list
            texts = [record[key] for key in keys]
            good = all(type(text) is str and text for text in texts)
        except (ValueError, KeyError, TypeError):
            good = False
        if not good:
            try:
                texts = _texts_of(line, rules)
            except BadRecord as bad:
                content, size = (
                    (None, line.size_bytes) if isinstance(line, Oversized) else (line, len(line))
                )
                rejected.append(Rejected(row, bad.reason, bad.detail, content, size))
                continue
        for column, text in zip(columns, texts, strict=False):
            column.append(text)
    return columns, rejected


def _texts_of(line: bytes | Oversized, rules: RecordRules) -> list[str]:
    """Texts of a line that is unusual, or none if it is blank.

    Python's own parser has the last word: it takes what Megatron's tool takes, ``NaN`` for example.
    """
    if isinstance(line, Oversized):
        raise rules.too_large(line.size_bytes)
    if not line.strip():
        return []
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRecord("invalid UTF-8", f"byte {error.start} of the line") from error
    except ValueError as error:
        raise BadRecord("not JSON", str(error)) from error
    except RecursionError as error:
        raise BadRecord("not JSON", "nested too deeply") from error
    if not isinstance(record, dict):
        raise BadRecord("not a JSON object", _json_type(record))
    texts = []
    for key in rules.keys:
        if key not in record:
            raise BadRecord(f"missing key `{key}`", f"it has {', '.join(record) or 'none'}"[:200])
        text = rules.check_text(key, record[key])
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadRecord("invalid UTF-8", "half of a surrogate pair") from error
        texts.append(text)
    return texts


def _json_type(value: object) -> str:
    names = {type(None): "null", bool: "a truth value", int: "a number", float: "a number"}
    names |= {list: "an array", dict: "an object", str: "a string"}
    return names.get(type(value), type(value).__name__)
