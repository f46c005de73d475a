"""Without the extra `hf` the remedy is named."""

import pytest
from conversions import QUIET

from megapoly.errors import UnavailableError
from megapoly.huggingface.export import ExportOptions, export
from megapoly.huggingface.importing import ImportOptions, import_model
from megapoly.huggingface.opening import open_model


def test_missing_libraries_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name[0] == "a" else name)
    for use in (
        lambda: export(ExportOptions(tmp_path, tmp_path / "hf"), QUIET),
        lambda: import_model(ImportOptions(tmp_path, tmp_path / "out"), QUIET),
        lambda: open_model(tmp_path),
    ):
        with pytest.raises(UnavailableError, match=r"accelerate is not installed.*megapoly\[hf\]"):
            use()
    assert list(tmp_path.iterdir()) == []
