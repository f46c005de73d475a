"""Text and memory of a parity check."""

import psutil
import pytest

from megapoly.conversion.parity_check import free_memory_bytes, sample_tokens
from megapoly.data.builtin import builtin_documents
from megapoly.data.tokenizer import load_tokenizer


@pytest.mark.parametrize(("length", "shape"), [(4096, (2, 128)), (128, (2, 128)), (8, (32, 8))])
def test_text_is_256_tokens_of_the_validation_part(length, shape):
    tokenizer = load_tokenizer(None)
    tokens = sample_tokens(tokenizer, length)
    assert tokens.shape == shape
    texts = [document.text for document in builtin_documents() if document.split == "validation"]
    for row in tokens.tolist():
        assert any(tokenizer.decode(row).strip("\ufffd") in text for text in texts)
    assert len({tuple(row) for row in tokens.tolist()}) == shape[0]


def test_free_memory_is_that_of_the_container(tmp_path, monkeypatch):
    machine = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine)  # others take and free some
    assert free_memory_bytes(tmp_path) == machine.available
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert free_memory_bytes(tmp_path) > 10_000
    (tmp_path / "memory.max").write_text("5000\n")
    assert free_memory_bytes(tmp_path) == 4000
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("3500\n")
    (tmp_path / "memory" / "memory.usage_in_bytes").write_text("1000\n")
    assert free_memory_bytes(tmp_path) == 2500
