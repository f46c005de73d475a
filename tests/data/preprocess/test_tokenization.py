import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from transformers import AutoTokenizer

from megapoly.data.preprocess import tokenization
from megapoly.data.preprocess.tokenization import (
    DoubtfulTexts,
    GigatokenBackend,
    ReferenceBackend,
    TokenBatch,
    add_ids,
    load_settings,
)
from megapoly.data.tokenizer import BUILTIN_TOKENIZER, Tokenizer
from megapoly.errors import DataError


def settings_of(path=None, **options):
    defaults = {
        "type_": "HuggingFaceTokenizer",
        "append_eod": True,
        "include_special_tokens": True,
        "split_special_tokens": False,
    }
    return load_settings(path and str(path), **(defaults | options))


@pytest.fixture
def with_template(tmp_path):
    """The built-in tokenizer, with a beginning and an end that its post-processor adds."""
    tokenizer = tokenizers.Tokenizer.from_file(str(BUILTIN_TOKENIZER))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    ids = [(name, tokenizer.token_to_id(name)) for name in ("<s>", "</s>")]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> <s> $A </s>", special_tokens=ids
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_a_tokenizer_that_splits_special_tokens(tmp_path):
    """As in transformers, the file decides without the option."""
    shutil.copy(BUILTIN_TOKENIZER, tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text('{"split_special_tokens": true}')
    from_file = settings_of(path=str(tmp_path))
    assert from_file.split_special_tokens and not settings_of().split_special_tokens
    text = ["a<|endoftext|>b"]
    expected = AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"]
    assert ReferenceBackend(from_file).encode(text).ids.tolist() == sum(expected, [])


@pytest.mark.parametrize("split_special_tokens", [False, True])
def test_both_backends_give_the_ids_of_the_library(texts, split_special_tokens):
    settings = settings_of(split_special_tokens=split_special_tokens)
    library = tokenizers.Tokenizer.from_file(str(BUILTIN_TOKENIZER))
    library.encode_special_tokens = split_special_tokens
    expected = [library.encode(text, add_special_tokens=False).ids for text in texts]
    eods = sum(ids.count(settings.eod) for ids in expected)
    assert (eods == 0) == split_special_tokens
    for backend in (ReferenceBackend(settings), GigatokenBackend(settings)):
        batch = backend.encode(texts)
        assert batch.ids.tolist() == sum(expected, [])
        assert batch.lengths.tolist() == [len(ids) for ids in expected]
        assert len(backend.encode([]).ids) == len(backend.encode([]).lengths) == 0


# Texts on which gigatoken 0.10 and tokenizers 0.23 differ: marks that their tables order
# differently, letters that one of them does not know.
OTHER_UNICODE = (
    "\u1ac4\u0301",
    "\u0e81\u0ec8\u0eba",
    "\u07fd\u0345",
    "\u0d3c\u0308",
    "\U000105d2\u0307",
    "\U0001611e\U0001611e",
    "\U000113c2",
    "\u088f's",
    "\U00032a80's",
)


def test_texts_of_other_versions_of_unicode_are_left_to_the_reference(tmp_path, texts):
    content = json.loads(BUILTIN_TOKENIZER.read_text()) | {"normalizer": {"type": "NFC"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    settings = settings_of(tmp_path)
    mixed = [part for pair in zip(OTHER_UNICODE, texts[:9], strict=True) for part in pair]
    fast, expected = (
        GigatokenBackend(settings).encode(mixed),
        ReferenceBackend(settings).encode(mixed),
    )
    assert np.array_equal(fast.ids, expected.ids)
    assert np.array_equal(fast.lengths, expected.lengths)
    is_doubtful = DoubtfulTexts(settings.json)
    assert sum(map(is_doubtful, OTHER_UNICODE)) >= 5
    assert not is_doubtful("caf\u00e9") and is_doubtful("cafe\u0301")
    assert not DoubtfulTexts(BUILTIN_TOKENIZER.read_text())("cafe\u0301")  # has no normalizer


def test_the_cache_of_a_backend_is_dropped_when_it_grows(texts, monkeypatch):
    settings = settings_of()
    backend = GigatokenBackend(settings)
    expected = backend.encode(texts)
    loaded = backend._tokenizer
    monkeypatch.setattr(tokenization, "MAX_CACHE_BYTES", -(1 << 40))
    assert np.array_equal(backend.encode(texts).ids, expected.ids)
    assert backend._tokenizer is not loaded
    assert np.array_equal(backend.encode(texts).ids, expected.ids)


def documents_of(batch: TokenBatch) -> list[list[int]]:
    return [part.tolist() for part in np.split(batch.ids, np.cumsum(batch.lengths)[:-1])]


@pytest.mark.parametrize("append_eod", [False, True])
def test_prefix_suffix_and_end_are_those_of_the_post_processor(with_template, append_eod):
    settings = settings_of(with_template, append_eod=append_eod)
    assert len(settings.prefix) == 2 and len(settings.suffix) == 1
    library = tokenizers.Tokenizer.from_file(str(with_template / "tokenizer.json"))
    texts = ["call me", "", "a", "", "", "Ishmael"]
    batch = add_ids(GigatokenBackend(settings).encode(texts), settings)
    end = [settings.eod] if append_eod else []
    assert documents_of(batch) == [library.encode(text).ids + end for text in texts]
    assert batch.ids.dtype == np.uint16
    without = settings_of(with_template, include_special_tokens=False)
    assert without.prefix == without.suffix == ()


def test_a_text_without_tokens_stays_empty():
    settings = settings_of()
    batch = add_ids(ReferenceBackend(settings).encode(["", "a", ""]), settings)
    assert [len(document) for document in documents_of(batch)] == [0, 2, 0]


def test_a_post_processor_that_changes_ids_is_refused(monkeypatch):
    monkeypatch.setattr(Tokenizer, "encode_with_special_tokens", lambda self, text: [7, 8])
    with pytest.raises(DataError, match=r"must only add ids.*\[7, 8\] with it.*no-include-special"):
        settings_of()


def test_gpt2_files_make_the_same_tokenizer(tmp_path, texts):
    content = json.loads(BUILTIN_TOKENIZER.read_text())
    merges = [m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]]
    (tmp_path / "vocab.json").write_text(json.dumps(content["model"]["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    files = {"vocab_file": str(tmp_path / "vocab.json"), "merge_file": str(tmp_path / "merges.txt")}
    gpt2 = settings_of(type_="GPT2BPETokenizer", **files)
    builtin = settings_of()
    assert (gpt2.eod, gpt2.vocab_size) == (builtin.eod, builtin.vocab_size)
    for backend in (ReferenceBackend, GigatokenBackend):
        expected = ReferenceBackend(builtin).encode(texts)
        assert np.array_equal(backend(gpt2).encode(texts).ids, expected.ids)
    assert settings_of(tmp_path).sha256 == gpt2.sha256  # the folder, as training reads it
    with pytest.raises(DataError, match="needs --vocab-file and --merge-file"):
        settings_of(type_="GPT2BPETokenizer")
    with pytest.raises(DataError, match="not the vocabulary and merges of a BPE"):
        settings_of(type_="GPT2BPETokenizer", **(files | {"vocab_file": files["merge_file"]}))


def test_the_preprocessor_needs_neither_torch_nor_the_engine():
    code = (
        "import sys, importlib, megapoly.data.preprocess.run, megapoly.data.preprocess.dry_run\n"
        "from megapoly.commands.preprocess import SUBCOMMANDS\n"
        "[importlib.import_module(name) for name in SUBCOMMANDS.values()]\n"
        "print([m for m in ('torch', 'megatron', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
