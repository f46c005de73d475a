"""Generation settings and length limits go through import, training and export."""

import json
import shutil

import pytest
import yaml
from conversions import QUIET, SIZES, llama, saved
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    OlmoeConfig,
    OlmoeForCausalLM,
)

from megapoly.checkpoints.run_file import read_run_file
from megapoly.checkpoints.seal import seal
from megapoly.commands import export, generate
from megapoly.conversion.export_model import ExportOptions, export_model
from megapoly.conversion.generation import text_settings
from megapoly.conversion.import_model import ImportOptions, import_model
from megapoly.conversion.imported_settings import ImportedSettings, load_settings
from megapoly.conversion.tokenizer_files import SpecialTokenIds
from megapoly.conversion.transformers_model import load_transformers_model
from megapoly.data.tokenizer import BUILTIN_TOKENIZER
from megapoly.errors import CheckpointError, DataError

PAD = 4096  # after the built-in tokenizer's ids, before the end of the model's
IDS = {"bos_token_id": 5, "eos_token_id": [0, 7], "pad_token_id": PAD}
GENERATION = {
    "bos_token_id": 5,
    "eos_token_id": [7, 0, 8],
    "pad_token_id": PAD,
    "do_sample": True,
    "temperature": 0.6,
    "top_p": 0.9,
    "repetition_penalty": 1.1,
    "suppress_tokens": [3],
    "max_new_tokens": 40,
    "stop_strings": ["\n\n"],
    "a_field_of_a_later_release": 1,
}


def olmoe(folder):
    return saved(
        OlmoeForCausalLM(OlmoeConfig(**SIZES, num_experts=2, num_experts_per_tok=2)), folder
    )


def change(path, **changes):
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(content | changes))


def read(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def there_and_back(folder, tmp_path, **options):
    checkpoint, back = tmp_path / "checkpoint", tmp_path / "back"
    report = import_model(ImportOptions(folder, checkpoint, skip_parity=True, **options), QUIET)
    export_model(ExportOptions(checkpoint, back, skip_parity=True), QUIET)
    return report, back


def add_padding(folder):
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    (end,) = content["added_tokens"]
    content["added_tokens"].append(end | {"id": PAD, "content": "<pad>"})
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("source", [llama, olmoe])
def test_settings_there_and_back(tmp_path, source):
    folder = source(tmp_path / "source")
    change(folder / "config.json", **IDS)
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    change(folder / "tokenizer_config.json", model_max_length=48)
    add_padding(folder)
    report, back = there_and_back(folder, tmp_path)
    assert report.notes == []
    config = read(back, "config")
    assert {name: config[name] for name in IDS} == IDS
    assert config["max_position_embeddings"] == 64
    assert read(back, "generation_config") == GENERATION
    opened = GenerationConfig.from_pretrained(back)
    assert (opened.temperature, opened.eos_token_id) == (0.6, [7, 0, 8])
    tokenizer = AutoTokenizer.from_pretrained(back)
    assert (tokenizer.model_max_length, tokenizer.eos_token_id) == (48, 0)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<pad>", PAD)
    for model in (back, tmp_path / "checkpoint"):
        opened, _ = load_transformers_model(model)
        assert opened.generation_config.stop_strings == ["\n\n"]
        assert opened.generation_config.eos_token_id == [7, 0, 8]
    assert generate.main(["--model", str(back), "--max-new-tokens", "2"]) == 0


@pytest.mark.parametrize("limit", [None, 10**30, 1e30])
def test_a_tokenizer_without_a_limit_gets_that_of_the_model(tmp_path, limit):
    folder = llama(tmp_path / "source")
    change(folder / "tokenizer_config.json", model_max_length=limit)
    _, back = there_and_back(folder, tmp_path)
    assert read(back, "tokenizer_config")["model_max_length"] == 64
    settings = load_settings(tmp_path / "checkpoint" / "tokenizer")
    assert settings.tokenizer_length(64) == 64


def test_limits_of_a_model_that_was_trained_further(tmp_path):
    """On shorter texts they stay; positions that the user adds are the tokenizer's, too."""
    folder = llama(tmp_path / "source")
    change(folder / "tokenizer_config.json", model_max_length=48)
    there_and_back(folder, tmp_path)
    path = tmp_path / "checkpoint" / "config.yaml"
    text = path.read_text()
    assert "seq_length: 64" in text
    for config, limits in {
        text.replace("seq_length: 64", "seq_length: 16"): (64, 48),
        text.replace("max_position_embeddings: 64", "max_position_embeddings: 128"): (128, 128),
    }.items():
        path.write_text(config)
        seal(path.parent, read_run_file(path.parent))
        output = tmp_path / str(limits[0])
        export_model(ExportOptions(tmp_path / "checkpoint", output, skip_parity=True), QUIET)
        found = read(output, "config")["max_position_embeddings"]
        assert (found, read(output, "tokenizer_config")["model_max_length"]) == limits


def test_old_models_have_generation_settings_in_their_config(tmp_path):
    folder = llama(tmp_path / "source")
    (folder / "generation_config.json").unlink()
    change(folder / "config.json", temperature=0.7, do_sample=True, eos_token_id=[0, 1])
    _, back = there_and_back(folder, tmp_path)
    assert read(back, "generation_config") == {
        "do_sample": True,
        "temperature": 0.7,
        "bos_token_id": None,
        "eos_token_id": [0, 1],
        "pad_token_id": 0,
    }


def test_ids_that_the_model_does_not_have_are_left_out_with_a_note(tmp_path):
    folder = llama(tmp_path / "source")
    change(folder / "config.json", pad_token_id=-1, eos_token_id=[0, 4099])
    report, back = there_and_back(folder, tmp_path)
    assert [note.split(" is left out")[0] for note in report.notes] == [
        "`eos_token_id` [0, 4099] in config.json",
        "`pad_token_id` -1 in config.json",
    ]
    assert read(tmp_path / "checkpoint", "import")["notes"] == report.notes
    config = read(back, "config")
    assert (config["eos_token_id"], config["pad_token_id"]) == ([0], None)
    change(folder / "config.json", pad_token_id="</s>")
    with pytest.raises(CheckpointError, match="`pad_token_id` in config.json must be a token id"):
        import_model(ImportOptions(folder, tmp_path / "other", skip_parity=True), QUIET)


def test_ids_of_another_tokenizer_are_left_out_with_a_note(tmp_path):
    folder = llama(tmp_path / "source")
    change(folder / "config.json", **IDS)
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    other = json.loads(BUILTIN_TOKENIZER.read_text())
    (tmp_path / "other.json").write_text(json.dumps(other))
    report, back = there_and_back(folder, tmp_path, tokenizer=str(tmp_path / "other.json"))
    assert "is another tokenizer than the model's" in report.notes[0]
    generation = read(back, "generation_config")
    assert (generation["eos_token_id"], generation["temperature"]) == (0, 0.6)
    assert "suppress_tokens" not in generation
    assert read(back, "config")["eos_token_id"] == 0


def test_an_export_with_another_tokenizer_has_no_ids_of_the_source(tmp_path, capsys):
    folder = llama(tmp_path / "source")
    change(folder / "config.json", **IDS)
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    there_and_back(folder, tmp_path)
    other = tmp_path / "other.json"
    other.write_text(json.dumps(json.loads(BUILTIN_TOKENIZER.read_text())))
    checkpoint = tmp_path / "checkpoint"
    arguments = ["--model", checkpoint, "--tokenizer", other, "--skip-parity", "--output"]
    assert export.main([*map(str, arguments), str(tmp_path / "with_other")]) == 0
    assert "token ids of the imported model are not exported" in capsys.readouterr().err
    generation = read(tmp_path / "with_other", "generation_config")
    assert (generation["eos_token_id"], generation["temperature"]) == (0, 0.6)
    # The run's folder is gone: nothing is known of the source but what the configuration has.
    (checkpoint / "tokenizer").rename(tmp_path / "gone")
    seal(checkpoint, read_run_file(checkpoint))
    assert export.main([*map(str, arguments), str(tmp_path / "without")]) == 0
    assert "does not exist here; if the model was imported" in capsys.readouterr().err
    assert read(tmp_path / "without", "config")["max_position_embeddings"] == 64


def test_the_end_of_a_document_ends_a_text():
    def settings(config, generation):
        imported = load_from(config, generation)
        return text_settings(SpecialTokenIds(bos=None, eos=3, pad=3), imported)

    for config, generation, expected, num_notes in (
        (2, [2, 4], ([2, 3], [2, 4, 3]), 2),
        (3, [2, 3], (3, [2, 3]), 0),
        (None, None, (3, 3), 0),
        ([3], 3, ([3], 3), 0),
    ):
        found = settings(config, generation)
        assert (found.eos, found.generation["eos_token_id"]) == expected
        assert len(found.notes) == num_notes
    plain = text_settings(SpecialTokenIds(bos=1, eos=3, pad=3), None)
    assert plain.generation == {"bos_token_id": 1, "eos_token_id": 3, "pad_token_id": 3}
    assert plain.pad is None  # transformers does not train the embedding of this id


def load_from(config, generation):
    return ImportedSettings({"eos_token_id": config}, {"eos_token_id": generation}, 64, None, {})


HEAD = """---
license: llama3.2
license_name: community
language: [en, de]
datasets:
- allenai/dolma
tags: [other]
---
# A model
---
"""


def head_of(folder):
    return yaml.safe_load((folder / "README.md").read_text().split("---")[1])


def test_license_language_and_data_are_those_of_the_source_unless_given(tmp_path):
    folder = llama(tmp_path / "source")
    (folder / "README.md").write_text(HEAD)
    _, back = there_and_back(folder, tmp_path)
    head = head_of(back)
    assert (head["license"], head["license_name"]) == ("llama3.2", "community")
    assert (head["language"], head["datasets"]) == (["en", "de"], ["allenai/dolma"])
    assert head["tags"] == ["megapoly", "swiglu"]
    arguments = [
        "--model",
        tmp_path / "checkpoint",
        "--output",
        tmp_path / "given",
        "--skip-parity",
    ]
    given = ["--license", "mit", "--language", "fr", "--datasets", "a/b", "c/d"]
    assert export.main([*map(str, arguments), *given]) == 0
    head = head_of(tmp_path / "given")
    assert (head["license"], head["language"], head["datasets"]) == ("mit", ["fr"], ["a/b", "c/d"])


def test_a_card_that_is_not_yaml_is_left_out_with_a_note(tmp_path):
    folder = llama(tmp_path / "source")
    (folder / "README.md").write_text("---\n{\n---\n")
    report, back = there_and_back(folder, tmp_path)
    assert "not YAML" in report.notes[0]
    assert "license" not in head_of(back)


def test_a_copy_of_the_tokenizer_says_where_documents_end_if_the_files_disagree(tmp_path):
    """As the message of the refusal asks for; the ids of the source stay."""
    folder = llama(tmp_path / "source")
    change(folder / "tokenizer_config.json", eos_token="<|endoftext|>")
    change(folder / "config.json", eos_token_id=7)
    change(folder / "generation_config.json", eos_token_id=[7, 9])
    with pytest.raises(DataError, match="one end-of-document token.*folder of their own"):
        there_and_back(folder, tmp_path)
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(folder / name, copy / name)
    shutil.rmtree(tmp_path / "checkpoint", ignore_errors=True)
    report, back = there_and_back(folder, tmp_path, tokenizer=str(copy))
    assert not any("another tokenizer" in note for note in report.notes)
    generation = read(back, "generation_config")["eos_token_id"]
    assert set(generation) == {0, 7, 9}
    assert read(back, "tokenizer_config")["eos_token"] == "<|endoftext|>"
