"""Files beside a tokenizer.json, compared with transformers' own reading of them."""

import json
import logging

import pytest
import tokenizers
from transformers import AutoTokenizer

from megapoly.data import tokenizer as tokenizer_module
from megapoly.data.tokenizer import BUILTIN_TOKENIZER, load_tokenizer
from megapoly.errors import DataError

END, STOP, CALL = "<|endoftext|>", "<|im_end|>", "<|call|>"
CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast"}
FIELDS = {"special": True, "lstrip": False, "rstrip": False, "normalized": False}
TEXT = f"the {CALL} dog{STOP}  x"


@pytest.fixture
def folder(tmp_path):
    """The built-in tokenizer with a second token that may end a document, id 4096."""
    library = tokenizers.Tokenizer.from_file(str(BUILTIN_TOKENIZER))
    library.add_special_tokens([STOP])
    library.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def write(folder, **files):
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def both(folder):
    """Return the end of a document and the ids of TEXT, by this project and by transformers."""
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    library = tokenizers.Tokenizer.from_str(ours.json)
    ids = library.encode(TEXT, add_special_tokens=False).ids
    return (ours.eod, ids), (
        theirs.eos_token_id,
        theirs(TEXT, add_special_tokens=False)["input_ids"],
    )


@pytest.mark.parametrize("as_object", [False, True])
@pytest.mark.parametrize(
    "files",
    [
        ("special_tokens_map",),
        ("tokenizer_config",),
        ("special_tokens_map", "tokenizer_config"),
    ],
)
def test_a_tokenizers_files_name_the_end(folder, files, as_object):
    named = {"eos_token": {"content": STOP, **FIELDS} if as_object else STOP}
    if as_object:
        named["eos_token"]["__type"] = "AddedToken"
    write(folder, **({"tokenizer_config": CONFIG} | {file: CONFIG | named for file in files}))
    ours, theirs = both(folder)
    assert ours == theirs and ours[0] == 4096


@pytest.mark.parametrize(
    "files",
    [
        {"generation_config": {"eos_token_id": 4096}},
        {"config": {"eos_token_id": [4096]}, "generation_config": {"eos_token_id": None}},
        {"config": {"eos_token_id": 4096}, "generation_config": {"eos_token_id": [0, 4096]}},
        {"tokenizer_config": CONFIG | {"eos_token": STOP}, "config": {"eos_token_id": [0, 4096]}},
    ],
)
def test_a_models_files_name_the_end(folder, files):
    write(folder, **files)
    assert load_tokenizer(folder).eod == load_tokenizer(folder / "tokenizer.json").eod == 4096


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (
            {"tokenizer_config": {"eos_token": END}, "special_tokens_map": {"eos_token": STOP}},
            r"tokenizer_config.json names 0 \(`<.endoftext.>`\); special_.* names 4096 \(`<.im_end",
        ),
        (
            {"tokenizer_config": {"eos_token": STOP}, "config": {"eos_token_id": 0}},
            r"tokenizer_config.json names 4096 .*; config.json names 0 ",
        ),
        ({"generation_config": {"eos_token_id": [0, 4096]}}, r"names 0 .* or 4096 "),
        (
            {"config": {"eos_token_id": 0}, "generation_config": {"eos_token_id": [5000, 4096]}},
            r"names 4096 .* or 5000 \(no token\); config.json names 0",
        ),
    ],
)
def test_files_that_disagree_are_refused(folder, files, found):
    write(folder, **files)
    with pytest.raises(DataError, match=f"must name one end-of-.*{found}.*name it as `eos_token`"):
        load_tokenizer(folder)


def test_a_file_that_transformers_does_not_read_does_not_count(folder):
    decoder = {"0": {"content": END, **FIELDS}, "4096": {"content": STOP, **FIELDS}}
    config = CONFIG | {"eos_token": STOP, "added_tokens_decoder": decoder}
    write(folder, tokenizer_config=config, special_tokens_map={"eos_token": END})
    ours, theirs = both(folder)
    assert ours == theirs and ours[0] == 4096


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer_config": {"eos_token": ["</s>"]}}, r"text of one token.*it is \[\"</s>\"\]"),
        ({"special_tokens_map": {"eos_token": "<no>"}}, "`<no>`, which special_tokens_map.json"),
        ({"config": {"eos_token_id": "2"}}, r"config.json` must be an id or a list.*it is \"2\""),
        ({"config": {"eos_token_id": 9999}}, "in the vocabulary.*config.json name 9999, which"),
        ({"generation_config": [1]}, "must be a JSON object; it is list"),
        ({"tokenizer_config": {"added_tokens_decoder": {"x": {}}}}, "must have an object for each"),
        (
            {"tokenizer_config": {"added_tokens_decoder": {"9000": {"content": CALL}}}},
            r"give `<.call.>` the id 9000; it gets 4097",
        ),
    ],
)
def test_files_that_cannot_be_used(folder, files, message):
    write(folder, **files)
    with pytest.raises(DataError, match=message):
        load_tokenizer(folder)


DECODER = {"4096": {"content": STOP, **FIELDS}, "4097": {"content": CALL, **FIELDS}}


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": CONFIG | {"eos_token": END, "added_tokens_decoder": DECODER}},
        {"tokenizer_config": CONFIG | {"eos_token": END}, "added_tokens": {CALL: 4097}},
        {
            "tokenizer_config": CONFIG | {"eos_token": END},
            "added_tokens": {CALL: 4097, STOP: 4096},
            "special_tokens_map": {"additional_special_tokens": [CALL, "dog"]},
        },
        {"tokenizer_config": CONFIG | {"eos_token": END, "extra_special_tokens": {"call": CALL}}},
        {"tokenizer_config": CONFIG | {"eos_token": END, "pad_token": "og"}},
    ],
)
def test_tokens_of_other_files(folder, files):
    """As transformers; the model's own vocabulary can also be named."""
    plain = load_tokenizer(folder)
    write(folder, **files)
    ours, theirs = both(folder)
    assert ours == theirs
    changed = load_tokenizer(folder)
    assert changed.fingerprint != plain.fingerprint
    assert changed.fingerprint == load_tokenizer(folder).fingerprint
    if "pad_token" not in files["tokenizer_config"]:
        assert 4097 in ours[1] and changed.vocab_size > 4097 == plain.vocab_size


@pytest.mark.parametrize("what", [("truncation",), ("padding",), ("truncation", "padding")])
def test_truncation_and_padding_are_cleared(folder, caplog, what):
    plain = load_tokenizer(folder)
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    if "truncation" in what:
        library.enable_truncation(8)
    if "padding" in what:
        library.enable_padding(length=16, pad_id=3, pad_token="!")
    library.save(str(folder / "tokenizer.json"))
    tokenizer_module._say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        cleared = [load_tokenizer(folder) for _ in range(2)][1]
    (message,) = caplog.messages
    assert f"was saved with {' and '.join(what)}; this is ignored" in message
    for text in ("a whale " * 30, "x"):
        assert cleared.encode(text) == plain.encode(text)
        assert cleared.encode_batch([text, "y"]) == plain.encode_batch([text, "y"])
    assert json.loads(cleared.json) == json.loads(plain.json)  # what exports and imports write
