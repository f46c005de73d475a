"""Tokenizers of a folder: the same ids in transformers as in training."""

import json
import re

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from megapoly.config import ModelConfig
from megapoly.conversion.tokenizer_files import check_vocabulary, write_tokenizer
from megapoly.data.builtin import builtin_documents
from megapoly.data.tokenizer import BUILTIN_TOKENIZER, load_tokenizer
from megapoly.errors import CheckpointError, DataError


@pytest.fixture
def source(tmp_path):
    """A tokenizer's folder with a beginning, padding, a class of one model and a template."""
    folder = tmp_path / "source"
    folder.mkdir()
    tokenizer = json.loads(BUILTIN_TOKENIZER.read_text())
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    names = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "auto_map": {"AutoTokenizer": ["elsewhere.Tokenizer", None]},
        "legacy": False,
        "bos_token": {"content": names[10]},
        "pad_token": names[11],
        "eos_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def test_ids_and_files(source, tmp_path):
    output = tmp_path / "output"
    output.mkdir()
    special = write_tokenizer(source, output, max_length=77)
    eod = load_tokenizer(source).eod
    assert (special.bos, special.eos, special.pad) == (10, eod, 11)
    config = json.loads((output / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["model_max_length"] == 77
    assert not {"auto_map", "legacy"} & set(config)
    assert (output / "chat_template.jinja").read_text() == "{{ messages }}"
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (10, eod, 11)
    for document in builtin_documents()[::60]:
        text = f"  {document.text[:200]}\n\n\n x"
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == load_tokenizer(source).encode(text)


def test_what_only_other_files_say_is_written_to_the_two(source, tmp_path):
    """Truncation and padding are left out; added tokens and the end of a document are in."""
    library = Tokenizer.from_file(str(source / "tokenizer.json"))
    library.enable_truncation(4)
    library.enable_padding(length=8)
    library.save(str(source / "tokenizer.json"))
    config = json.loads((source / "tokenizer_config.json").read_text()) | {"eos_token": None}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    (source / "added_tokens.json").write_text('{"<|call|>": 4096}')
    (source / "special_tokens_map.json").write_text('{"eos_token": "<|call|>"}')
    output = tmp_path / "output"
    output.mkdir()
    assert write_tokenizer(source, output, max_length=77).eos == 4096
    written = json.loads((output / "tokenizer.json").read_text())
    assert written["truncation"] is written["padding"] is None
    opened = AutoTokenizer.from_pretrained(output)
    assert (opened.eos_token_id, opened("a<|call|>")["input_ids"][1:]) == (4096, [4096])
    assert load_tokenizer(output).eod == 4096
    assert not (output / "special_tokens_map.json").exists()


@pytest.mark.parametrize("pad", [None, 7, 4096])
def test_batches_are_padded(tmp_path, pad):
    """By the end of a document if there is no special token for it; others are part of texts."""
    content = json.loads(BUILTIN_TOKENIZER.read_text())
    (end,) = content["added_tokens"]
    content["added_tokens"].append(end | {"id": 4096, "content": "<call>", "special": False})
    source = tmp_path / "source.json"
    source.write_text(json.dumps(content))
    special = write_tokenizer(source, tmp_path, max_length=64, pad=pad)
    assert special.pad == special.eos
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    texts = ["Call me Ishmael.", "(&)"]
    ids = [load_tokenizer(None).encode(text) for text in texts]
    missing = len(ids[0]) - len(ids[1])
    batch = tokenizer(texts, padding=True)
    assert batch["input_ids"] == [ids[0], ids[1] + [special.eos] * missing]
    assert batch["attention_mask"][1] == [1] * len(ids[1]) + [0] * missing


def test_a_special_token_that_there_is_not_is_refused(source, tmp_path):
    path = source / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "<pad>"}))
    with pytest.raises(DataError, match="`pad_token`.*'<pad>' is not"):
        write_tokenizer(source, tmp_path, max_length=8)


def test_tokens_without_embedding_are_named(source):
    """Such as the padding that copies of Llama 2 have added to the tokenizer alone."""
    size = load_tokenizer(source).vocab_size
    check_vocabulary(source, ModelConfig(vocab_size=size))
    added = {f"<pad{i}>": size + i for i in range(5)}
    (source / "added_tokens.json").write_text(json.dumps(added))
    shown = f"it has {size} (`<pad0>`), {size + 1} (`<pad1>`), {size + 2} (`<pad2>`) and 2 more. If"
    with pytest.raises(CheckpointError, match=re.escape(shown)):
        check_vocabulary(source, ModelConfig(vocab_size=size))
    (source / "added_tokens.json").unlink()  # the remedy
    check_vocabulary(source, ModelConfig(vocab_size=size))
