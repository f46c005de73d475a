import logging

import numpy as np
import pytest
from test_tokenization import settings_of
from token_data import write_jsonl

from megapoly.data.preprocess import backend_check, worker
from megapoly.data.preprocess.backend_check import choose_backend
from megapoly.data.preprocess.tokenization import GigatokenBackend, TokenBatch
from megapoly.errors import DataError


class Wrong(GigatokenBackend):
    """Gives a wrong id for a text that contains the word."""

    word = "whale"

    def encode(self, texts):
        batch = super().encode(texts)
        ids = batch.ids.copy()
        first = 0
        for text, length in zip(texts, batch.lengths, strict=True):
            if self.word in text:
                ids[first] += 1
            first += length
        return TokenBatch(ids, batch.lengths)


def test_an_exact_backend_is_taken(texts):
    backend, reference = choose_backend(settings_of(), "auto", texts[:9])
    assert (backend.kind, reference.kind) == ("gigatoken", "tokenizers")
    backend, reference = choose_backend(settings_of(), "tokenizers", texts[:9])
    assert backend is reference


@pytest.mark.parametrize("word", ["whale", "</w>", "endoftext"])  # input, hard text, added token
def test_another_id_anywhere_in_the_sample_is_noticed(monkeypatch, caplog, word):
    monkeypatch.setattr(backend_check, "GigatokenBackend", Wrong)
    monkeypatch.setattr(Wrong, "word", word)
    sample = ["a", "the whale itself", "b"]
    with pytest.raises(DataError, match=r"from token 0 it gives .* instead of .*tokenizers"):
        choose_backend(settings_of(), "gigatoken", sample)
    with caplog.at_level(logging.WARNING):
        backend, reference = choose_backend(settings_of(), "auto", sample)
    assert backend is reference
    assert "Using tokenizers, which is exact and many times slower" in caplog.text


def test_every_nth_document_is_compared_while_it_runs(run, tmp_path, monkeypatch):
    """The word comes after the sample: only the comparison during the run can see it."""
    monkeypatch.setattr(backend_check, "GigatokenBackend", Wrong)
    monkeypatch.setattr(worker, "GigatokenBackend", Wrong)
    monkeypatch.setattr("megapoly.data.preprocess.run.sample_texts", lambda sources, rules: ["a"])
    texts = ["sea"] * 100
    texts[59] = "the whale"
    write_jsonl(tmp_path / "a.jsonl", texts)
    with pytest.raises(DataError, match="gigatoken .* must give the ids of tokenizers .*the whale"):
        run(tmp_path / "a.jsonl", check_every=20)
    assert not list(tmp_path.glob("out_text*"))
    run(tmp_path / "a.jsonl", check_every=7, restart=True)  # 59 is not one of these


def test_the_end_of_a_long_document_is_compared_too(run, tmp_path, monkeypatch):
    monkeypatch.setattr(backend_check, "GigatokenBackend", Wrong)
    monkeypatch.setattr(worker, "GigatokenBackend", Wrong)
    monkeypatch.setattr(worker, "COMPARED_CHARS", 100)
    monkeypatch.setattr("megapoly.data.preprocess.run.sample_texts", lambda sources, rules: ["a"])
    write_jsonl(tmp_path / "a.jsonl", ["sea " * 100 + "the whale"] * 9)
    with pytest.raises(DataError, match="must give the ids of tokenizers .*--restart"):
        run(tmp_path / "a.jsonl", check_every=1)


def test_a_missing_package_is_reported(monkeypatch, caplog):
    monkeypatch.setitem(__import__("sys").modules, "gigatoken", None)
    with caplog.at_level(logging.WARNING):
        backend, _ = choose_backend(settings_of(), "auto", [])
    assert backend.kind == "tokenizers" and "pip install" in caplog.text
    assert np.array_equal(backend.encode(["a"]).ids, backend.encode(["a"]).ids)
