import copy

import pytest

from megapoly.data.fingerprint import differences, fingerprint


def source(name: str, share: float, **changes):
    plain = {"path": f"data/{name}", "tokens": 1000, "fingerprint": f"of {name}"}
    return plain | {"name": name, "share": share} | changes


DESCRIPTION = {
    "sources": [source("cc", 0.5), source("wiki", 0.25), source("code", 0.25)],
    "tokenizer": "a" * 64,
    "seq_length": 32,
    "seed": 7,
}


def changed(sources=None, **changes):
    description = copy.deepcopy(DESCRIPTION) | changes
    description["sources"] = sources or description["sources"]
    return description


CC, WIKI, CODE = DESCRIPTION["sources"]


@pytest.mark.parametrize(
    ("current", "expected"),
    [
        (changed(seed=8), ["`data.seed` is 8 here and 7 in the checkpoint"]),
        (changed(seq_length=64), ["`training.seq_length` is 64 here and 32 in the checkpoint"]),
        (changed(tokenizer="b" * 64), ["tokenizer is another one (SHA-256 bbbbbbbbbbbb.. here"]),
        (
            changed([CC, WIKI, CODE, source("math", 0.1)]),
            ["source `math` (data/math) was added"],
        ),
        (changed([CC, WIKI]), ["source `code` (data/code) was removed"]),
        (
            changed([source("cc", 0.5, fingerprint="x", tokens=1200), WIKI, CODE]),
            ["files of source `cc` changed (1,000 tokens in the checkpoint at data/cc, 1,200 here"],
        ),
        (
            changed([source("cc", 0.6), source("wiki", 0.15), CODE]),
            [
                "share of source `cc` is 0.6 here and 0.5 in the checkpoint",
                "share of source `wiki` is 0.15 here and 0.25 in the checkpoint",
            ],
        ),
        (changed([WIKI, CC, CODE]), ["another order (`wiki`, `cc`, `code` here, `cc`, `wiki`"]),
        (
            changed([WIKI, source("math", 0.5)], seed=8),
            ["`math` (data/math) was added", "`cc`", "`code`", "`data.seed`"],
        ),
    ],
)
def test_each_difference_is_reported(current, expected):
    found = differences(DESCRIPTION, current)
    assert len(found) == len(expected)
    for sentence, part in zip(found, expected, strict=True):
        assert part in sentence
    assert fingerprint(current) != fingerprint(DESCRIPTION)


def test_another_path_or_name_is_no_other_data():
    moved = [CC | {"path": "elsewhere", "name": "common crawl"}, WIKI, CODE]
    assert differences(DESCRIPTION, changed(moved)) == []
    assert fingerprint(changed(moved)) == fingerprint(DESCRIPTION)


def test_sources_of_the_same_content_are_distinguished_by_their_position():
    twins = changed([source("a", 0.5, fingerprint="x"), source("b", 0.5, fingerprint="x")])
    assert differences(twins, copy.deepcopy(twins)) == []
