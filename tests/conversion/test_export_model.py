"""Checkpoints of the real job at several layouts, exported: the same logits and text."""

import dataclasses
import json
import os
import pickle
import shutil

import pytest
import torch
import yaml
from conversions import (
    NUM_NEW_TOKENS,
    QUIET,
    export_broken,
    export_of_rank,
    open_in_memory,
    parity_with_layers_on_disk,
)
from safetensors import safe_open
from transformers import AutoTokenizer

from megapoly.checkpoints.seal import seal
from megapoly.conversion.checkpoint_model import (
    check_finite,
    checked_mappings,
    is_trained_with,
    tokenizer_source,
)
from megapoly.conversion.checkpoint_reader import CheckpointReader
from megapoly.conversion.export_model import ExportOptions, export_model
from megapoly.conversion.parity import ParityError
from megapoly.conversion.transformers_model import load_transformers_model
from megapoly.data.tokenizer import BUILTIN_TOKENIZER, load_tokenizer
from megapoly.errors import CheckpointError
from megapoly.study.analysis.command import AnalysisRequest, analyze
from megapoly.testing import run_on_ranks

QUICK = ["dense", "polyrelu", "moe", "per_expert", "olmoe"]
SLOW = [
    "polyrelunorm",
    "polyprelu",
    "per_expert_polyprelu",
    "gated",
    "geglu",
    "bf16",
    "sequential",
]
MODEL_TYPES = {"olmoe": "olmoe", "geglu": "llama"}


def assert_same_model(name, folder, parity, of_engine, of_export):
    assert parity["passed"]
    assert parity["max_difference"] <= 1e-5
    assert parity["num_tokens"] + parity["excluded_positions"] == 256 + 64
    assert parity["last_position"] == 2 * 64 - 1
    assert max(parity["near_difference"], parity["far_difference"]) <= 1e-5
    assert parity["excluded_positions"] <= 16
    assert parity["argmax_agreement"] == 1.0
    assert parity["checkpoint_loss"] == pytest.approx(parity["export_loss"], abs=1e-5)
    assert not any(parity["loading"].values())
    assert parity["first_difference"] is None
    assert max(parity["module_differences"].values()) < 1e-5
    assert parity["experts_not_reached"] == 0
    assert of_engine == of_export
    assert len(of_engine) == 8 + NUM_NEW_TOKENS
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == MODEL_TYPES.get(name, "megapoly")
    assert (folder / "modeling_megapoly.py").is_file() == (name not in MODEL_TYPES)
    assert json.loads((folder / "parity.json").read_text()) == parity


def test_the_export_is_the_same_model(exported):
    for name, result in zip(QUICK, exported(*QUICK), strict=True):
        assert_same_model(name, *result)


@pytest.mark.parallel
def test_the_export_is_the_same_model_in_other_cases(exported):
    for name, result in zip(SLOW, exported(*SLOW), strict=True):
        assert_same_model(name, *result)


def test_a_wrong_mapping_fails_and_keeps_what_was_written(trained, tmp_path):
    output = tmp_path / "export"
    with pytest.raises(RuntimeError, match=r"first module that differs is `model.layers.0.self_at"):
        run_on_ranks(export_broken, 1, trained("moe"), output)
    assert not output.exists()
    report = json.loads((tmp_path / "export.failed" / "parity.json").read_text())
    assert not report["passed"]
    assert report["module_differences"]["model.layers.0.input_layernorm"] < 1e-6
    assert report["module_differences"]["model.layers.0.self_attn.q_norm"] > 0.1
    assert list(tmp_path.iterdir()) == [tmp_path / "export.failed"]


def test_large_models_are_compared_with_their_layers_on_disk(trained, exported):
    ((folder, *_),) = exported("per_expert")
    (parity,) = run_on_ranks(parity_with_layers_on_disk, 1, trained("per_expert"), folder)
    assert parity["passed"]


def test_a_conversion_waits_for_no_other_process(trained, tmp_path):
    assert run_on_ranks(export_of_rank, 2, trained("dense"), tmp_path) == [True, True]


def test_a_checkpoint_opens_in_memory(trained, exported):
    for name in ("olmoe", "per_expert"):
        ((folder, *_),) = exported(name)
        ((in_memory, on_disk),) = run_on_ranks(
            open_in_memory, 1, trained(name), folder, list(range(5, 60, 3))
        )
        assert (in_memory == on_disk).all()


def test_weights_are_those_of_the_checkpoint(trained, exported):
    """One tensor of each kind by hand, from the shapes that the engine gives its tensors."""
    ((folder, *_),) = exported("per_expert")
    reader = CheckpointReader(trained("per_expert"))
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        qkv = reader.read("decoder.layers.self_attention.linear_qkv.weight", (2,))
        blocks = qkv.view(2, 4, 12, 48)  # two groups of two queries, a key and a value
        proj = {n: file.get_tensor(f"model.layers.2.self_attn.{n}_proj.weight") for n in "qkv"}
        assert torch.equal(proj["q"].view(2, 2, 12, 48), blocks[:, :2])
        assert torch.equal(proj["k"].view(2, 12, 48), blocks[:, 2])
        assert torch.equal(proj["v"].view(2, 12, 48), blocks[:, 3])
        place = "model.layers.3.mlp.experts.5."
        fc1 = reader.read("decoder.layers.mlp.experts.experts.linear_fc1.weight", (3, 5))
        assert torch.equal(file.get_tensor(f"{place}gate_proj.weight"), fc1[:32])
        assert torch.equal(file.get_tensor(f"{place}up_proj.weight"), fc1[32:])
        key = "decoder.layers.mlp.experts.experts.activation_func.coefficients"
        a = reader.read(key, (3, 5))
        assert file.get_tensor(f"{place}act_fn.weight").tolist() == [a[3], a[2], a[1]]
        assert file.get_tensor(f"{place}act_fn.bias").tolist() == [a[0]]
        embedding = reader.read("embedding.word_embeddings.weight", ())
        assert torch.equal(file.get_tensor("model.embed_tokens.weight"), embedding[:4096])


def test_dtype_and_shards(trained, exported, tmp_path):
    ((folder, *_),) = exported("dense")
    output = tmp_path / "bf16"
    options = ExportOptions(
        trained("dense"),
        output,
        dtype=torch.bfloat16,
        max_shard_size=100_000,
        skip_parity=True,
    )
    assert export_model(options, QUIET) is None
    index = json.loads((output / "model.safetensors.index.json").read_text())["weight_map"]
    with safe_open(folder / "model.safetensors", framework="pt") as whole:
        assert set(whole.keys()) == set(index)
        for name, file in index.items():
            with safe_open(output / file, framework="pt") as shard:
                assert torch.equal(shard.get_tensor(name), whole.get_tensor(name).bfloat16())
    sizes = {path.name: path.stat().st_size for path in output.glob("*.safetensors")}
    assert len(sizes) == 3
    assert sorted(sizes)[0] == f"model-00001-of-{len(sizes):05d}.safetensors"
    embedding = index["model.embed_tokens.weight"]
    assert all(size < 110_000 for name, size in sizes.items() if name != embedding)
    config = json.loads((output / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert json.loads((output / "parity.json").read_text()) == {"skipped": True}
    assert "not compared" in (output / "README.md").read_text()


def test_tokenizer_and_model_card(trained, exported):
    ((folder, parity, *_),) = exported("moe")
    text = "Call me Ishmael.  Some years ago\n"
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert tokenizer(text)["input_ids"] == load_tokenizer(None).encode(text)
    assert tokenizer.eos_token_id == load_tokenizer(None).eod
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == (
        "PreTrainedTokenizerFast"
    )
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == load_tokenizer(None).eod
    assert tokenizer.pad_token_id == generation["pad_token_id"] == load_tokenizer(None).eod
    assert json.loads((folder / "config.json").read_text())["pad_token_id"] is None
    card = (folder / "README.md").read_text()
    run = json.loads((trained("moe") / "run.json").read_text())
    assert run["data_fingerprint"] in card
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "transformers"
    assert front["language"] == ["en"]  # of the built-in text
    assert "license" not in front
    block = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    expected = yaml.safe_load((trained("moe") / "config.yaml").read_text())
    # Folders of the machine are no part of a card.
    assert block["run_dir"] == trained("moe").parents[1].name
    assert block["data"].pop("cache_dir") is None
    for description in (block, expected):
        description.pop("run_dir")
        description["data"].pop("cache_dir", None)
    assert block == expected
    assert "/" + trained("moe").parents[1].name not in card


def test_an_existing_folder_is_left_alone(trained, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    for overwrite, match in ((False, "add --overwrite"), (True, "has none of parity.json")):
        with pytest.raises(CheckpointError, match=match):
            export_model(ExportOptions(trained("dense"), tmp_path, overwrite=overwrite), QUIET)
    with pytest.raises(CheckpointError, match="is a file"):
        export_model(ExportOptions(trained("dense"), tmp_path / "mine.txt", overwrite=True), QUIET)
    with pytest.raises(CheckpointError, match="cannot be created"):
        export_model(ExportOptions(trained("dense"), tmp_path / "mine.txt" / "hf"), QUIET)
    assert (tmp_path / "mine.txt").read_text() == "mine"
    assert list(tmp_path.iterdir()) == [tmp_path / "mine.txt"]


def test_the_source_is_left_alone(trained):
    checkpoint = trained("dense")
    before = sorted(checkpoint.parents[1].rglob("*"))
    for output in (checkpoint, checkpoint.parents[1], checkpoint / "hf"):
        with pytest.raises(CheckpointError, match="neither be in the source"):
            export_model(ExportOptions(checkpoint, output, overwrite=True), QUIET)
    assert sorted(checkpoint.parents[1].rglob("*")) == before


def test_an_export_replaces_an_export(trained, tmp_path):
    options = ExportOptions(trained("dense"), tmp_path / "hf", skip_parity=True, overwrite=True)
    export_model(options, QUIET)
    (tmp_path / "hf" / "left.txt").write_text("of the first")
    export_model(options, QUIET)
    assert not (tmp_path / "hf" / "left.txt").exists()
    assert list(tmp_path.iterdir()) == [tmp_path / "hf"]


def copy_with(checkpoint, folder, change):
    """A copy of a checkpoint with a changed tensor file."""
    shutil.copytree(checkpoint, folder)
    change(folder)
    return folder


def test_damaged_checkpoints_are_refused(trained, tmp_path):
    def truncate(folder):
        path = sorted(folder.glob("*.distcp"))[0]
        path.write_bytes(path.read_bytes()[:1000])

    def scribble(folder):
        (folder / ".metadata").write_bytes(b"no pickle")

    def listed(folder):
        (folder / "run.json").write_text("[]")

    changes = {
        truncate: r"__0_0\.distcp has 1,000 bytes, not",
        scribble: r"\.metadata has 9 bytes, not",
        listed: r"run\.json is damaged \(it is no object\)",
    }
    for change, match in changes.items():
        folder = copy_with(trained("dense"), tmp_path / change.__name__, change)
        with pytest.raises(CheckpointError, match=match):
            export_model(ExportOptions(folder, tmp_path / "hf", skip_parity=True), QUIET)
    assert not (tmp_path / "hf").exists()


def test_commands_take_the_newest_checkpoint_that_is_whole(trained, tmp_path, caplog):
    """To export, generate and analyse; and they leave the damaged one where it is."""
    whole, damaged = (tmp_path / "run/checkpoints" / f"iter_000000{i}" for i in (3, 6))
    for copy in (whole, damaged):
        shutil.copytree(trained("dense"), copy)
    path = sorted(damaged.glob("*.distcp"))[0]
    data = path.read_bytes()
    path.write_bytes(data[:9000] + bytes([data[9000] ^ 1]) + data[9001:])
    export_model(ExportOptions(tmp_path / "run", tmp_path / "hf", skip_parity=True), QUIET)
    message = f"{damaged} is damaged: {path.name} is damaged (another CRC-32 than when it was"
    assert message in caplog.text and f"{whole} is used instead" in caplog.text
    model, _ = load_transformers_model(tmp_path / "run")
    with safe_open(tmp_path / "hf/model.safetensors", "pt") as exported:
        name = "model.norm.weight"
        assert torch.equal(model.state_dict()[name], exported.get_tensor(name))
    request = AnalysisRequest(checkpoint=tmp_path / "run", parts=("rank",), output=tmp_path / "a")
    analyze(request)
    found = json.loads((tmp_path / "a/analysis.json").read_text())
    assert found["checkpoint"] == str(whole)
    for use in (
        lambda: export_model(ExportOptions(damaged, tmp_path / "no", skip_parity=True), QUIET),
        lambda: load_transformers_model(damaged),
        lambda: analyze(dataclasses.replace(request, checkpoint=damaged)),
    ):
        with pytest.raises(CheckpointError, match="is damaged .* Give another checkpoint, or a"):
            use()
    assert damaged.is_dir()


def test_an_index_that_names_code_is_refused(trained, tmp_path):
    """By every command that reads tensors without the engine; sealing refuses it, too."""

    class Touch:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'executed'}",)

    folder = tmp_path / "evil"
    shutil.copytree(trained("dense"), folder)
    (folder / ".metadata").write_bytes(pickle.dumps(Touch()))
    run = json.loads((folder / "run.json").read_text())
    with pytest.raises(CheckpointError, match="names `posix.system`"):
        seal(folder, run)
    for key in ("files", "crc32"):
        del run[key]
    (folder / "run.json").write_text(json.dumps(run))
    request = AnalysisRequest(checkpoint=folder, parts=("rank",), output=tmp_path / "a")
    for use in (
        lambda: export_model(ExportOptions(folder, tmp_path / "no", skip_parity=True), QUIET),
        lambda: load_transformers_model(folder),
        lambda: analyze(request),
    ):
        with pytest.raises(CheckpointError, match="names `posix.system`"):
            use()
    assert not (tmp_path / "executed").exists()


def test_weights_that_are_not_finite_are_refused():
    check_finite(torch.zeros(3), "w")
    for value in (torch.nan, torch.inf):
        with pytest.raises(CheckpointError, match="`w` has some"):
            check_finite(torch.tensor([0.0, value]), "`w`")


def test_another_tokenizer(trained, tmp_path):
    """It must not have more ids than the model; one of the run must be what it was."""
    larger = json.loads(BUILTIN_TOKENIZER.read_text())
    larger["model"]["vocab"]["one more"] = 4096
    (tmp_path / "larger.json").write_text(json.dumps(larger))
    options = {"checkpoint": trained("dense"), "output": tmp_path / "hf", "skip_parity": True}
    with pytest.raises(CheckpointError, match=r"ids \(4097\).*`vocab_size` \(4096\)"):
        export_model(ExportOptions(**options, tokenizer=str(tmp_path / "larger.json")), QUIET)
    same = tmp_path / "same.json"
    same.write_text(json.dumps(json.loads(BUILTIN_TOKENIZER.read_text())))
    reader = CheckpointReader(trained("dense"))
    assert is_trained_with(reader, None)
    assert not is_trained_with(reader, str(same))
    reader.config.data.tokenizer = str(same)
    with pytest.raises(CheckpointError, match="has changed since"):
        tokenizer_source(reader, None)
    assert tokenizer_source(reader, str(same)) == str(same)
    reader.config.data.tokenizer = str(tmp_path / "gone.json")
    with pytest.raises(CheckpointError, match="--tokenizer"):
        tokenizer_source(reader, None)


def test_incomplete_checkpoints_are_refused(trained, tmp_path):
    with pytest.raises(CheckpointError, match=r"iter_\*"):
        CheckpointReader(tmp_path)
    reader = CheckpointReader(trained("dense"))
    reader.config.model.qk_norm = "head"
    with pytest.raises(CheckpointError, match="q_layernorm.weight` is missing"):
        checked_mappings(reader)
    reader.config.model.qk_norm = "none"
    reader.config.model.num_layers = 3
    with pytest.raises(CheckpointError, match="numbers, .* are used"):
        checked_mappings(reader)
    reader.config.model.num_layers = 4
    reader.config.model.ffn_hidden_size = 80
    with pytest.raises(CheckpointError, match="expected for `model.layers.0.mlp.up_proj.weight`"):
        checked_mappings(reader)


def test_parity_error_is_not_a_checkpoint_error():
    assert not issubclass(ParityError, CheckpointError)
