"""Without the extra `hf` the remedy is named."""

import pytest
from conversions import QUIET

from megapoly.conversion.export_model import ExportOptions, export_model
from megapoly.conversion.import_model import ImportOptions, import_model
from megapoly.conversion.transformers_model import load_transformers_model
from megapoly.errors import UnavailableError


def test_missing_libraries_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name[0] == "a" else name)
    for use in (
        lambda: export_model(ExportOptions(tmp_path, tmp_path / "hf"), QUIET),
        lambda: import_model(ImportOptions(tmp_path, tmp_path / "out"), QUIET),
        lambda: load_transformers_model(tmp_path),
    ):
        with pytest.raises(UnavailableError, match=r"accelerate is not installed.*megapoly\[hf\]"):
            use()
    assert list(tmp_path.iterdir()) == []
