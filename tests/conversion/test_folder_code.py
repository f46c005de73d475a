"""Whose code is in a folder."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from megapoly.conversion.architecture import CODE_FILES
from megapoly.conversion.folder_code import (
    PACKAGED_CODE,
    check_code,
    check_code_is_ours,
    code_of_others,
    note_on_code,
)
from megapoly.conversion.parity_check import load_folder
from megapoly.conversion.transformers_model import model_from_folder
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


@pytest.mark.parametrize(
    "entry",
    [
        {"_attn_implementation": "a/kernel"},
        {"attn_implementation": "paged|a/kernel@main:forward"},
        {"attn_implementation": {"text_config": "a/kernel"}},
        {"text_config": {"_attn_implementation": "flash_attention_2"}},
        {"experts_implementation": "a/kernel"},
    ],
)
def test_kernels_of_the_hub(export, entry):
    """transformers 5.24 loads the first from ``config.json`` alone."""
    config = export / "config.json"
    change(config, **{name: "sdpa" for name in entry})
    check_code(export)
    change(config, **entry)
    with pytest.raises(CheckpointError, match=r"names kernels of the hub.*(a/kernel|flash_att)"):
        check_code(export)
    change(config, model_type="llama", auto_map=None)
    with pytest.raises(CheckpointError, match="names kernels of the hub"):
        load_folder(export, export, run_code=False)
    with pytest.raises(CheckpointError, match="names kernels of the hub"):
        model_from_folder(export, run_code=False)


@pytest.mark.skipif(find_spec("kernels") is not None, reason="it would be downloaded")
def test_transformers_looks_for_a_kernel_that_a_configuration_names(tmp_path):
    """What the refusal is for: without it, the attempt to load one is all that fails here."""
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    change(tmp_path / "config.json", _attn_implementation="a/kernel")
    with pytest.raises(ImportError, match="kernels"):
        AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=False)
