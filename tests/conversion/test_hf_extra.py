"""Without the extra `hf` the remedy is named."""

import sys

import pytest
from conversions import QUIET

from megapoly.commands import export, generate, import_
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
        with pytest.raises(UnavailableError, match=r"needs accelerate: .*megapoly\[hf\]"):
            use()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [export, import_, generate])
def test_commands_say_it_in_one_sentence(monkeypatch, tmp_path, capsys, command):
    monkeypatch.setitem(sys.modules, "transformers", None)
    output = [] if command is generate else ["--output", str(tmp_path / "out")]
    assert command.main(["--model", str(tmp_path), *output]) == 2
    purpose = "Generation" if command is generate else "A Hugging Face model"
    remedy = "needs transformers: pip install 'megapoly[hf]'"
    assert capsys.readouterr().err == f"{purpose} {remedy}\n"
    assert list(tmp_path.iterdir()) == []
