"""Loading a model from a folder or a checkpoint, and errors for others."""

import dataclasses
import json
import shutil

import pytest
import torch
from evaluation_jobs import TEXTS, encoded_by_engine_lm, rule_of_loaded
from lm_eval.api.instance import Instance
from rich.console import Console
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from megapoly.conversion.bos_rule import bos_rule
from megapoly.conversion.export_model import ExportOptions, export_model
from megapoly.conversion.import_model import ImportOptions, import_model
from megapoly.errors import CheckpointError, EvaluationError, UnavailableError
from megapoly.evaluation.lm_loader import load_lm
from megapoly.testing import run_on_ranks

QUIET = Console(quiet=True)
OPTIONS = {"dtype": "auto", "device": "cpu", "batch_size": 2}


@pytest.fixture
def copied(export, tmp_path):
    return shutil.copytree(export, tmp_path / "copy")


def test_a_model_as_it_is_stored(export, copied):
    config = json.loads((copied / "config.json").read_text())
    assert load_lm(copied, **OPTIONS).model.dtype == torch.float32
    (copied / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    lm = load_lm(copied, **OPTIONS)
    assert lm.model.dtype == torch.bfloat16 and lm.softmax_dtype == torch.float32
    assert lm.batch_size == 2 and lm.max_length == 512
    stored = load_file(export / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(lm.model.model.layers[1].mlp.up_proj.weight, stored.bfloat16())
    float32 = load_lm(copied, **OPTIONS | {"dtype": "float32"})
    assert float32.model.dtype == torch.float32


def test_neither_a_model_nor_a_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"is not a model. .* a run with .*config.json\)\.$"):
        load_lm(tmp_path, **OPTIONS)
    with pytest.raises(CheckpointError, match="this folder does not exist"):
        load_lm(tmp_path / "none", **OPTIONS)


def test_a_checkpoint_scores_as_by_hand(trained, evaluated):
    """Cut contexts, no context, and a continuation that is longer than the model's texts."""
    lm = load_lm(trained("dense")[0], **OPTIONS)
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in TEXTS]
    by_hand = evaluated("dense", "1")[0].by_hand
    for (score, greedy), expected in zip(lm.loglikelihood(requests), by_hand, strict=True):
        assert score == pytest.approx(expected[0], abs=1e-4) and greedy == expected[1]
    assert lm.max_length == 32


def test_too_long_for_a_model_of_others(export):
    lm = load_lm(export, **OPTIONS)
    with pytest.raises(EvaluationError, match=r"an answer of \d+ tokens .* context \(512\)"):
        lm.loglikelihood([Instance("loglikelihood", {}, ("Sea", "swim " * 600), 0)])
    with pytest.raises(EvaluationError, match="a task generates 512 tokens"):
        lm.generate_until([Instance("generate_until", {}, ("a", {"max_gen_toks": 512}), 0)])


@pytest.fixture(scope="module")
def with_bos(export, tmp_path_factory):
    """A Llama whose tokenizer begins every text with the token 1."""
    folder = shutil.copytree(export, tmp_path_factory.mktemp("bos") / "model")
    path = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    bos = tokenizer.id_to_token(1)
    tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, 1)]
    )
    tokenizer.save(str(path))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": bos}))
    return folder


BOS_TEXTS = ["The whale", "", "a <|endoftext|> b"]


@pytest.mark.parametrize("add_bos", [False, True])
def test_bos_of_a_model_that_was_trained_here(with_bos, tmp_path, add_bos):
    folder = shutil.copytree(with_bos, tmp_path / "ours")
    (folder / "parity.json").write_text("{}")
    lm = load_lm(folder, **OPTIONS, add_bos=add_bos)
    ids = [*map(lm.tok_encode, BOS_TEXTS), [lm.prefix_token_id]]
    assert [each[:1] == [1] for each in ids] == [add_bos] * 4
    eod = lm.tokenizer.eos_token_id
    assert eod not in ids[2] and (ids[3] == [eod]) != add_bos
    assert run_on_ranks(encoded_by_engine_lm, 1, folder, BOS_TEXTS, add_bos) == [ids]


def test_bos_of_a_model_of_others(with_bos, export):
    for add_bos in (None, True):
        lm = load_lm(with_bos, **OPTIONS, add_bos=add_bos)
        ids = [lm.tok_encode(text) for text in BOS_TEXTS]
        assert [each[:1] for each in ids] == [[1]] * 3 and lm.tokenizer.eos_token_id in ids[2]
    without = load_lm(with_bos, **OPTIONS, add_bos=False)
    assert [without.tok_encode(text) for text in BOS_TEXTS] == [each[1:] for each in ids]
    assert not without.adds_bos and not load_lm(export, **OPTIONS).adds_bos
    with pytest.raises(EvaluationError, match="`--add-bos` needs a tokenizer that puts a token"):
        load_lm(export, **OPTIONS, add_bos=True)


def test_an_import_begins_texts_as_its_source_does(with_bos, export, tmp_path):
    """And so does the export of the import; one process and the engine alike."""
    imported, exported = tmp_path / "imported", tmp_path / "exported"
    import_model(ImportOptions(with_bos, imported, skip_parity=True), QUIET)
    export_model(ExportOptions(imported, exported, skip_parity=True), QUIET)
    (exported / "parity.json").touch()  # what tells a plain Llama from other projects'
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in TEXTS]
    expected = load_lm(with_bos, **OPTIONS)
    scores = expected.loglikelihood(requests)
    for folder in (imported, exported):
        lm = load_lm(folder, **OPTIONS)
        assert expected.adds_bos and lm.adds_bos and bos_rule(folder)
        for text in BOS_TEXTS[:2]:
            assert lm.tok_encode(text) == expected.tok_encode(text) and lm.tok_encode(text)[0] == 1
        for (score, _), (other, _) in zip(lm.loglikelihood(requests), scores, strict=True):
            assert score == pytest.approx(other, abs=1e-4)
    without = load_lm(imported, **OPTIONS, add_bos=False)
    assert without.tok_encode("The whale") == expected.tok_encode("The whale")[1:]
    assert run_on_ranks(rule_of_loaded, 1, imported) == [True]
    import_model(ImportOptions(export, tmp_path / "plain", skip_parity=True), QUIET)
    assert bos_rule(tmp_path / "plain") is False and bos_rule(with_bos) is None


def test_a_tokenizer_that_replaces_the_models_decides(with_bos, export, tmp_path):
    for tokenizer in (with_bos, with_bos / "tokenizer.json"):
        options = ImportOptions(export, tmp_path / "a", str(tokenizer), overwrite=True)
        import_model(dataclasses.replace(options, skip_parity=True), QUIET)
        assert bos_rule(tmp_path / "a") is True
        assert load_lm(tmp_path / "a", **OPTIONS).tok_encode("")[0] == 1


def test_weights_that_are_not_there_are_not_drawn(copied):
    weights = load_file(copied / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    rest = {key: value for key, value in weights.items() if key != name}
    save_file(rest, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"lacks weights that its config.json .*: {name}"):
        load_lm(copied, **OPTIONS)


def test_damaged_folder(copied):
    (copied / "model.safetensors").write_bytes(b"none")
    with pytest.raises(CheckpointError, match="cannot be opened as a model in Hugging Face's"):
        load_lm(copied, **OPTIONS)


def test_no_such_device(export):
    with pytest.raises(UnavailableError, match=r"`device` \(abacus\) cannot be used"):
        load_lm(export, **OPTIONS | {"device": "abacus"})
