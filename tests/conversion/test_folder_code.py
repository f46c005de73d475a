"""Whose code is in a folder."""

from __future__ import annotations

import json
import shutil

import pytest

from megapoly.conversion.architecture import CODE_FILES
from megapoly.conversion.folder_code import (
    PACKAGED_CODE,
    check_code_is_ours,
    code_of_others,
    note_on_code,
)
from megapoly.errors import CheckpointError


@pytest.fixture
def export(tmp_path):
    """Configuration and code of an export."""
    auto_map = {
        "AutoConfig": "configuration_megapoly.MegapolyConfig",
        "AutoModelForCausalLM": "modeling_megapoly.MegapolyForCausalLM",
    }
    config = {"model_type": "megapoly", "auto_map": auto_map}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name in CODE_FILES:
        shutil.copyfile(PACKAGED_CODE / name, tmp_path / name)
    return tmp_path


def change(path, **entries):
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(content | entries))


def test_an_export_has_no_code_of_others(export):
    assert code_of_others(export) == [] and note_on_code(export) is None
    check_code_is_ours(export)


def test_a_changed_byte_is_code_of_others(export):
    path = export / "ffn_megapoly.py"
    path.write_bytes(path.read_bytes() + b"\n")
    assert code_of_others(export) == ["ffn_megapoly.py"]
    note = f"code in {export} is not run (ffn_megapoly.py): this package's classes open the model"
    assert note_on_code(export) == note
    with pytest.raises(CheckpointError, match="ffn_megapoly.py was put there or changed"):
        check_code_is_ours(export)


@pytest.mark.parametrize(
    ("auto_map", "found"),
    [
        ({"AutoTokenizer": [None, "tok.Fast"]}, ["tok.py"]),
        (["tok.Slow", "tok.Fast"], ["tok.py"]),
        ({"AutoTokenizer": "a/b--tok.Fast"}, ["tok.py of a/b"]),
        ("tok.Fast", ["tok.py"]),
        ({"AutoTokenizer": 3}, []),
        (None, []),
    ],
)
def test_code_of_a_tokenizer(export, auto_map, found):
    change(export / "tokenizer_config.json", auto_map=auto_map)
    assert code_of_others(export) == found


def test_modules_beside_those_that_are_named(export):
    (export / "helpers.py").touch()
    (export / "custom_generate").mkdir()
    (export / "custom_generate/generate.py").touch()
    assert code_of_others(export) == ["custom_generate/generate.py", "helpers.py"]
    change(export / "config.json", auto_map=None, model_type="llama")
    assert code_of_others(export) == ["custom_generate/generate.py"]  # nothing names the others


def test_a_model_that_nothing_else_opens(export):
    change(export / "config.json", model_type="mine", auto_map={"AutoModel": "mine.Model"})
    with pytest.raises(
        CheckpointError, match=r"\(`model_type` mine\).*: mine.py. Read it, then add"
    ):
        note_on_code(export)
