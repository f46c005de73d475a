import json

import pytest

from megapoly.data.preprocess.text_extraction import OversizedLine, RecordRules, parse_lines

GOOD = b'{"text": "call me"}'
BAD = {
    b'{"text": "a\xff"}': ("invalid UTF-8", "byte 11 of the line"),
    rb'{"text": "\ud800"}': ("invalid UTF-8", "half of a surrogate pair"),
    b'{"text": "a"': ("not JSON", "delimiter"),
    b"[" * 100_000: ("not JSON", ""),
    b'["text"]': ("not a JSON object", "an array"),
    b'"text"': ("not a JSON object", "a string"),
    b'{"content": "x", "id": 3}': ("missing key `text`", "content, id"),
    b"{}": ("missing key `text`", "none"),
    b'{"text": 3}': ("`text` is not a string", "a number"),
    b'{"text": null}': ("`text` is not a string", "null"),
    b'{"text": ["a"]}': ("`text` is not a string", "an array"),
    b'{"text": ""}': ("empty text", "`text`"),
    OversizedLine(100 << 20): ("longer than --max-document-mib", "100.0 MiB, the limit is 1"),
}


@pytest.mark.parametrize("line", BAD, ids=[f"{v[0]}-{i}" for i, v in enumerate(BAD.values())])
def test_bad_lines_are_named_and_those_beside_them_kept(rules, line):
    reason, detail = BAD[line]
    columns, rejected = parse_lines([GOOD, line, GOOD], 5, rules)
    assert columns == [["call me", "call me"]]
    (record,) = rejected
    assert (record.row, record.reason) == (6, reason)
    assert detail in record.detail
    is_oversized = isinstance(line, OversizedLine)
    assert record.content == (None if is_oversized else line)
    assert record.size_bytes == (line.size_bytes if is_oversized else len(line))


def test_blank_lines_are_no_records(rules):
    columns, rejected = parse_lines([b"", GOOD, b" \r", GOOD + b"\r"], 0, rules)
    assert columns == [["call me"] * 2] and not rejected


def test_what_pythons_parser_takes_is_taken(rules):
    lines = [b'{"score": NaN, "text": "a"}', b'{"text": "a", "text": "b"}', b'{"text": "\\u00e9"}']
    assert parse_lines(lines, 0, rules) == ([["a", "b", "é"]], [])


def test_empty_texts_may_be_kept():
    rules = RecordRules(("text",), keep_empty=True, max_document_bytes=100)
    assert parse_lines([b'{"text": ""}', GOOD], 0, rules) == ([["", "call me"]], [])


def test_a_line_that_is_bad_for_one_key_is_bad_for_all():
    rules = RecordRules(("text", "title"), keep_empty=False, max_document_bytes=100)
    lines = [json.dumps(record).encode() for record in (
        {"text": "a", "title": "A"}, {"text": "b"}, {"text": "c", "title": 3},
        {"title": "D", "text": "d"},
    )]  # fmt: skip
    columns, rejected = parse_lines(lines, 0, rules)
    assert columns == [["a", "d"], ["A", "D"]]
    assert [(r.row, r.reason) for r in rejected] == [
        (1, "missing key `title`"),
        (2, "`title` is not a string"),
    ]
