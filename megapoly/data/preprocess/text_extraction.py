"""Extract texts from lines of JSON, and say why a line has none."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from megapoly.platform import extras

try:
    import orjson
except ImportError as error:
    raise extras.unavailable("The preprocessor", "data", ["orjson"]) from error


@dataclass(frozen=True)
class OversizedLine:
    """A line that was not kept because it is longer than the limit.

    Args:
        size_bytes: length of the line.
    """

    size_bytes: int


@dataclass(frozen=True)
class Rejection:
    """A line, row or document without a valid text, or the rest of a damaged file.

    Args:
        row: index of the line or row in its range of the file, from 0.
        reason: one of a few reasons, for counting.
        detail: details of this case; may be empty.
        content: the line or value, if it was kept.
        size_bytes: length of the line or value.
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
class TextBatch:
    """Texts of some consecutive lines or rows of a file.

    Args:
        texts: for each JSON key its texts; all lists have the same length.
        rejected: lines or rows without a valid text.
        num_rows: number of lines or rows, including rejected and blank ones.
        source_bytes: bytes of the file on disk that were read for it.
        position: where reading a stream can resume after it, see the reader; None: not here.
    """

    texts: list[list[str]]
    rejected: list[Rejection] = field(default_factory=list)
    num_rows: int = 0
    source_bytes: int = 0
    position: int | None = None


class BadRecord(Exception):
    """A record has no valid text.

    Args:
        reason: as in :class:`Rejection`.
        detail: as in :class:`Rejection`.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason)
        # A key of the record may hold half of a surrogate pair, which cannot be written to a file.
        self.reason, self.detail = reason, detail.encode("utf-8", "backslashreplace").decode()


@dataclass(frozen=True)
class RecordRules:
    """Rules for a valid record.

    Args:
        keys: keys of the JSON object or columns of the table; their values are strings.
        keep_empty: whether an empty text is an empty document; false: it is rejected.
        max_document_bytes: longest line of JSON, or text in UTF-8.
    """

    keys: tuple[str, ...]
    keep_empty: bool
    max_document_bytes: int

    def too_large(self, size_bytes: int) -> BadRecord:
        """Return the error for a line or text above the limit."""
        limit = self.max_document_bytes / 2**20
        return BadRecord(
            "longer than --max-document-mib",
            f"{size_bytes / 2**20:.1f} MiB, the limit is {limit:g}",
        )

    def check_text(self, key: str, value: object) -> str:
        """Return the value as a text.

        Raises:
            BadRecord: it is not a string, or it is empty.
        """
        if not isinstance(value, str):
            raise BadRecord(f"`{key}` is not a string", _json_type(value))
        if not value and not self.keep_empty:
            raise BadRecord("empty text", f"`{key}`")
        return value


def parse_lines(
    lines: Sequence[bytes | OversizedLine], first_row: int, rules: RecordRules
) -> tuple[list[list[str]], list[Rejection]]:
    """Return the texts of lines of JSON for each key, and the rejected lines.

    Blank lines are ignored: many files end with one.
    """
    columns: list[list[str]] = [[] for _ in rules.keys]
    rejected = []
    keys, loads = rules.keys, orjson.loads
    for row, line in enumerate(lines, first_row):
        try:
            record = loads(line)  # type: ignore[arg-type] # TypeError if oversized
            texts = [record[key] for key in keys]
            is_valid = all(type(text) is str and text for text in texts)
        except (ValueError, KeyError, TypeError):
            is_valid = False
        if not is_valid:
            try:
                texts = _texts_of(line, rules)
            except BadRecord as bad:
                content, size = (
                    (None, line.size_bytes)
                    if isinstance(line, OversizedLine)
                    else (line, len(line))
                )
                rejected.append(Rejection(row, bad.reason, bad.detail, content, size))
                continue
        for column, text in zip(columns, texts, strict=False):
            column.append(text)
    return columns, rejected


def _texts_of(line: bytes | OversizedLine, rules: RecordRules) -> list[str]:
    """Return the texts of an unusual line; [] if it is blank.

    Python's own parser decides: it accepts what Megatron's tool accepts, for example ``NaN``.
    """
    if isinstance(line, OversizedLine):
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
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number"}
    names |= {list: "an array", dict: "an object", str: "a string"}
    return names.get(type(value), type(value).__name__)
