"""The choice between the two backends."""

from __future__ import annotations

import logging
import shutil

import pytest
import torch

from megapoly.errors import UnavailableError
from megapoly.ops import polynorm
from megapoly.ops.backends import _fastest, resolve_backend, triton_missing

COEFFICIENTS = torch.ones(4)


@pytest.fixture(autouse=True)
def fresh_choice():
    for function in (resolve_backend, _fastest):
        function.cache_clear()
    yield
    for function in (resolve_backend, _fastest):
        function.cache_clear()


@pytest.fixture
def no_compiler(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))


def test_compiled_without_a_compiler_is_an_error_that_says_what_to_do(no_compiler):
    with pytest.raises(UnavailableError, match="no C\\+\\+ compiler.*activation_backend auto"):
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


def test_auto_on_a_gpu_takes_triton_where_its_kernels_know_the_dtype(monkeypatch):
    monkeypatch.setattr("megapoly.ops.backends._triton_is_installed", lambda: True)
    assert resolve_backend("auto", "cuda", torch.bfloat16) == "triton"
    assert resolve_backend("auto", "cuda", torch.float64) == "compiled"
    monkeypatch.setattr("megapoly.ops.backends._triton_is_installed", lambda: False)
    resolve_backend.cache_clear()
    _fastest.cache_clear()
    assert resolve_backend("auto", "cuda", torch.bfloat16) == "reference"


@pytest.mark.parametrize(
    ("device_type", "dtype", "installed", "word"),
    [
        ("cpu", torch.float32, True, "need a CUDA device"),
        ("cuda", torch.float64, True, "not torch.float64"),
        ("cuda", torch.float32, False, "pip install triton"),
    ],
)
def test_triton_where_it_cannot_run_says_why(monkeypatch, device_type, dtype, installed, word):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("megapoly.ops.backends._triton_is_installed", lambda: installed)
    assert word in triton_missing(device_type, dtype)
    with pytest.raises(UnavailableError, match="`triton` activation backend"):
        resolve_backend("triton", device_type, dtype)


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="one of auto, reference"):
        resolve_backend("cuda", "cpu")
