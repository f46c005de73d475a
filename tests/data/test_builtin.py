from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Library

from megapoly.data import builtin
from megapoly.data.builtin import builtin_documents, prepare_builtin_text
from megapoly.data.token_files import open_token_file
from megapoly.data.tokenizer import BUILTIN_TOKENIZER, load_tokenizer


def test_split_is_by_document_and_spread_over_the_authors():
    documents = builtin_documents()
    parts = {split: [d for d in documents if d.split == split] for split in ("train", "validation")}
    sources = {split: {d.source for d in part} for split, part in parts.items()}
    lines = {
        split: {line for d in part for line in d.text.splitlines() if len(line) > 60}
        for split, part in parts.items()
    }
    size = {split: sum(len(d.text) for d in part) for split, part in parts.items()}

    assert len(parts["train"]) + len(parts["validation"]) == len(documents) == 420
    assert len({d.source for d in documents}) == len(documents)
    assert not sources["train"] & sources["validation"]
    assert not lines["train"] & lines["validation"]
    assert 0.04 < size["validation"] / (size["train"] + size["validation"]) < 0.06
    authors = Counter(source.split("/")[0] for source in sources["validation"])
    assert set(authors) == {"melville", "milton", "shakespeare"}


@pytest.mark.parametrize("word", ["gutenberg", "copyright", "ebook", "http", "rights reserved"])
def test_no_headers_or_licences(word):
    assert [d.source for d in builtin_documents() if word in d.text.lower()] == []


@pytest.fixture
def few_documents(monkeypatch):
    documents = builtin_documents()[:25]
    monkeypatch.setattr(builtin, "builtin_documents", lambda: documents)
    return documents


def test_token_files_are_the_documents(few_documents, tmp_path, tokenizer):
    for split, prefix in prepare_builtin_text(tmp_path, tokenizer).items():
        expected = [
            token
            for document in few_documents
            if document.split == split
            for token in (*tokenizer.encode(document.text), tokenizer.eod)
        ]
        assert np.fromfile(f"{prefix}.bin", np.uint16).tolist() == expected
        assert open_token_file(prefix).num_tokens == len(expected)


def test_token_files_are_made_once_for_each_tokenizer(few_documents, tmp_path, tokenizer):
    first = prepare_builtin_text(tmp_path / "cache", tokenizer)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    assert prepare_builtin_text(tmp_path / "cache", tokenizer) == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()} == times

    other = Library.from_file(str(BUILTIN_TOKENIZER))
    other.add_tokens(["whale"])
    other.save(str(tmp_path / "tokenizer.json"))
    second = prepare_builtin_text(tmp_path / "cache", load_tokenizer(tmp_path))
    assert not set(first.values()) & set(second.values())
    assert len(list((tmp_path / "cache").iterdir())) == 12


@pytest.mark.parametrize("ending", ["bin", "idx", "sums.json"])
def test_damaged_token_files_are_made_again(few_documents, tmp_path, tokenizer, caplog, ending):
    prefix = prepare_builtin_text(tmp_path, tokenizer)["train"]
    path = Path(f"{prefix}.{ending}")
    content = path.read_bytes()
    path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    prepare_builtin_text(tmp_path, tokenizer)
    assert path.read_bytes() == content
    assert len(caplog.records) == 1 and "is built again" in caplog.text


def test_text_is_not_read_where_its_tokens_are(few_documents, tmp_path, tokenizer, monkeypatch):
    prefixes = prepare_builtin_text(tmp_path, tokenizer)
    monkeypatch.setattr(builtin, "builtin_documents", lambda: pytest.fail("was read"))
    assert prepare_builtin_text(tmp_path, tokenizer) == prefixes


def test_interrupted_tokenization_is_repeated(few_documents, tmp_path, tokenizer, monkeypatch):
    class Stopped(Exception):
        pass

    def stop(texts):
        raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(tokenizer, "encode_batch", stop)
        prepare_builtin_text(tmp_path, tokenizer)
    assert list(tmp_path.iterdir()) == []
    prepare_builtin_text(tmp_path, tokenizer)
    assert len(list(tmp_path.iterdir())) == 6
