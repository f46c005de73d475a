import json
import shutil

import pytest
from tokenizers import Tokenizer as Library
from tokenizers import models, processors

from megapoly.data.builtin import builtin_documents
from megapoly.data.tokenizer import BUILTIN_TOKENIZER, load_tokenizer
from megapoly.errors import DataError

UNICODE = "  “Naïve” — café\r\n\tΩ≈ç√ 日本語 🐳 e\u0301 \x00end "


def save_words(path, *words: str, post_processor=None) -> None:
    library = Library(models.WordLevel({word: i for i, word in enumerate(words)}, words[0]))
    if post_processor is not None:
        library.post_processor = post_processor
    library.save(str(path))


@pytest.mark.parametrize("text", [UNICODE, "", "\n\n", "<|endoftext|>"])
def test_text_is_decoded_unchanged(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_batch([text, "x"])[0] == tokenizer.encode(text)


def test_books_are_decoded_unchanged(tokenizer):
    for document in builtin_documents()[::30]:
        ids = tokenizer.encode(document.text)
        assert tokenizer.decode(ids) == document.text
        assert len(ids) < len(document.text) / 2.5  # the merges fit this text


def test_vocabulary_and_end_of_document(tokenizer):
    assert tokenizer.vocab_size == 4096
    assert tokenizer.decode([tokenizer.eod]) == "<|endoftext|>"
    assert tokenizer.eod not in tokenizer.encode("a <|endoftext|> b")


def test_folder_and_file_are_the_same(tokenizer, tmp_path):
    shutil.copy(BUILTIN_TOKENIZER, tmp_path)
    for path in (tmp_path, str(tmp_path / "tokenizer.json")):
        assert load_tokenizer(path).fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("name", ["<|endoftext|>", "</s>", "<eos>"])
def test_usual_end_of_document_names(tmp_path, name):
    save_words(tmp_path / "tokenizer.json", "unknown", "a", name)
    assert load_tokenizer(tmp_path).eod == 2


@pytest.mark.parametrize("as_object", [False, True])
def test_tokenizer_config_decides_the_end_of_document(tmp_path, as_object):
    save_words(tmp_path / "tokenizer.json", "unknown", "</s>", "stop")
    token = {"content": "stop"} if as_object else "stop"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": token}))
    assert load_tokenizer(tmp_path).eod == 2


def test_vocabulary_with_holes_is_as_large_as_its_highest_id(tmp_path):
    Library(models.WordLevel({"</s>": 0, "a": 9}, "</s>")).save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).vocab_size == 10


def test_no_special_tokens_are_added(tmp_path):
    template = processors.TemplateProcessing("</s> $A", special_tokens=[("</s>", 1)])
    save_words(tmp_path / "tokenizer.json", "unknown", "</s>", "a", post_processor=template)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("a") == [2]
    assert tokenizer.encode_batch(["a"]) == [[2]]


def test_unusable_files_are_refused(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="not a tokenizer.json"):
        load_tokenizer(tmp_path)
    save_words(tmp_path / "tokenizer.json", "unknown", "a")
    with pytest.raises(DataError, match="must have an end-of-document token.*eos_token"):
        load_tokenizer(tmp_path)
