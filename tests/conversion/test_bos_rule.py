"""The beginning of texts is what transformers makes of a tokenizer's files."""

import json

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, processors
from transformers import AutoTokenizer

from megapoly.conversion.bos_rule import added_by_file, bos_rule, rule_of_import
from megapoly.conversion.tokenizer_files import write_tokenizer
from megapoly.conversion.transformers_tokenizer import (
    AddedIds,
    added_by_transformers,
    open_in_transformers,
)

WORDS = ["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", "ab"]


@pytest.fixture
def folder(tmp_path):
    """A folder with a SentencePiece-like tokenizer of Llama's class; its file adds nothing."""
    model = models.BPE(
        {word: i for i, word in enumerate(WORDS)}, [("▁", "a"), ("a", "b")], unk_token="<unk>"
    )
    library = tokenizers.Tokenizer(model)
    library.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    library.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)])
    library.add_special_tokens(WORDS[:3])
    folder = tmp_path / "model"
    folder.mkdir()
    library.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text('{"model_type": "llama", "eos_token_id": 2}')
    write_config(folder, tokenizer_class="LlamaTokenizer", add_bos_token=True)
    return folder


def write_config(folder, **changes):
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | changes))


def written_by_import(folder, tmp_path):
    """Return the rule, and the ids that transformers gives with the written files."""
    output = tmp_path / "written"
    output.mkdir()
    write_tokenizer(folder, output, max_length=8)
    rule = rule_of_import(folder, None, output)
    return rule, AutoTokenizer.from_pretrained(output)("ab a")["input_ids"]


@pytest.mark.parametrize(
    ("name", "rule"), [("CodeLlamaTokenizer", True), ("LlamaTokenizer", False)]
)
def test_a_class_that_adds_bos(folder, tmp_path, name, rule):
    """The file does not add it: the written one is corrected."""
    write_config(folder, tokenizer_class=name)
    expected = AutoTokenizer.from_pretrained(folder)("ab a")["input_ids"]
    assert (expected[0] == 1) == rule
    assert added_by_file(folder) == AddedIds()
    assert written_by_import(folder, tmp_path) == (rule, expected)
    assert added_by_file(tmp_path / "written") == AddedIds((1,) if rule else ())


def test_a_file_that_adds_bos(folder, tmp_path):
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    library.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    library.save(str(folder / "tokenizer.json"))
    before = (folder / "tokenizer.json").read_text()
    assert written_by_import(folder, tmp_path) == (True, [1, 6, 5, 6])
    assert (tmp_path / "written" / "tokenizer.json").read_text() == before


def test_ids_after_a_text_are_kept(folder, tmp_path):
    write_config(folder, tokenizer_class="RobertaTokenizer")  # it also splits words otherwise
    assert written_by_import(folder, tmp_path)[0] is True
    assert added_by_file(tmp_path / "written") == AddedIds((1,), (2,))


def test_a_class_that_needs_code_is_not_run(folder, tmp_path):
    (folder / "mine.py").write_text("raise SystemExit('run')")
    write_config(folder, auto_map={"AutoTokenizer": ["mine.Mine", None]}, tokenizer_class="Mine")
    assert added_by_transformers(folder) == AddedIds()
    assert written_by_import(folder, tmp_path)[0] is False


def test_an_export_records_its_rule(folder, tmp_path):
    assert bos_rule(folder) is None
    (folder / "parity.json").write_text("{}")
    assert bos_rule(folder) is True
    write_config(folder)
    assert bos_rule(folder) is False


def test_truncation_is_cleared_in_transformers_also(folder):
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    library.enable_truncation(2)
    library.enable_padding(length=9)
    library.save(str(folder / "tokenizer.json"))
    for run_code in (False, True):
        opened = open_in_transformers(folder, run_code=run_code)
        assert opened.backend_tokenizer.truncation is opened.backend_tokenizer.padding is None
        assert len(opened("a b a b", add_special_tokens=False)["input_ids"]) > 2


def test_the_ids_around_a_text():
    assert AddedIds.between([5, 6], [1, 5, 6, 2]) == AddedIds((1,), (2,))
    assert AddedIds.between([5], [5]) == AddedIds()
