"""The choice between the two backends."""

from __future__ import annotations

import logging
import shutil

import pytest
import torch

from megapoly.errors import UnavailableError
from megapoly.ops import polynorm
from megapoly.ops.backends import resolve_backend

COEFFICIENTS = torch.ones(4)


@pytest.fixture(autouse=True)
def fresh_choice():
    resolve_backend.cache_clear()
    yield
    resolve_backend.cache_clear()


@pytest.fixture
def no_compiler(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))


def test_compiled_without_a_compiler_is_an_error_that_says_what_to_do(no_compiler):
    with pytest.raises(UnavailableError, match="no C\\+\\+ compiler.*activation_backend reference"):
        polynorm(torch.ones(3, 8), COEFFICIENTS, backend="compiled")


def test_auto_without_a_compiler_says_so_once(no_compiler, caplog):
    caplog.set_level(logging.INFO)
    for _ in range(2):
        polynorm(torch.ones(3, 8), COEFFICIENTS, backend="auto")
    (record,) = caplog.records
    assert "reference" in record.getMessage() and "no C++ compiler" in record.getMessage()


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_auto_takes_the_compiler_that_there_is_and_says_so_once(monkeypatch, caplog):
    monkeypatch.delenv("CXX", raising=False)
    caplog.set_level(logging.INFO)
    assert [resolve_backend("auto", "cpu") for _ in range(2)] == ["compiled", "compiled"]
    assert [record.getMessage() for record in caplog.records] == ["activation backend: compiled"]


def test_compiler_is_the_one_that_torch_will_call(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UnavailableError, match="no-such-compiler"):
        resolve_backend("compiled", "cpu")


def test_reference_needs_no_compiler(no_compiler, caplog):
    caplog.set_level(logging.INFO)
    polynorm(torch.ones(3, 8), COEFFICIENTS, backend="reference")
    assert not caplog.records
