"""Without the extra `hf` the remedy is named."""

import pytest
from conversions import QUIET

from megapoly.conversion.export import ExportOptions, export
from megapoly.conversion.import_folder import ImportOptions, import_model
from megapoly.conversion.open_model import open_model
from megapoly.errors import UnavailableError


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
