"""Llama, OLMoE, exports and PolyCom releases become checkpoints that training continues from."""

import json

import pytest
import torch
import yaml
from conversions import QUIET, SIZES, import_and_back, import_only, llama, saved
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
)

from megapoly.checkpoints.seal import seal
from megapoly.config import ModelConfig, load_yaml
from megapoly.conversion.activation_change import ActivationChange, change_activation
from megapoly.conversion.bos_rule import bos_rule
from megapoly.conversion.checkpoint_reader import CheckpointReader
from megapoly.conversion.export_model import ExportOptions, export_model
from megapoly.conversion.import_model import ImportOptions, import_model
from megapoly.errors import CheckpointError, ConfigError
from megapoly.model.initial_values import initial_value
from megapoly.testing import run_job, run_on_ranks

FILES = ("config", "generation_config", "tokenizer_config")


def tensors(folder):
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def assert_same_tensors(one, other):
    a, b = tensors(one), tensors(other)
    assert set(a) == set(b)
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)), name


def run(recipe, run_dir, num_ranks, **options):
    settings = {
        "training.train_iters": 2,
        "training.seq_length": 30,
        "training.micro_batch_size": 2,
        "training.global_batch_size": 4,
        "optimizer.lr_warmup_iters": 1,
        "logging.tensorboard": False,
    }
    return run_job(str(recipe), run_dir, settings | options, num_ranks=num_ranks)


def test_llama_there_and_back_and_on_at_other_layouts(tmp_path):
    """Grouped queries, tied embeddings, a theta of its own: the same bits, logits and training."""
    folder = llama(
        tmp_path / "llama",
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 50_000.0},
    )
    generation = {"do_sample": True, "temperature": 0.6, "eos_token_id": [0, 7]}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    checkpoint, back = tmp_path / "checkpoint", tmp_path / "back"
    (report,) = run_on_ranks(import_and_back, 1, folder, checkpoint, back)
    assert report["parity"]["passed"]
    assert report["parity"]["max_difference"] <= 1e-5
    assert_same_tensors(folder, back)
    assert json.loads((back / "config.json").read_text())["model_type"] == "llama"
    assert load_yaml(checkpoint / "config.yaml").model.rotary_base == 50_000
    described = json.loads((checkpoint / "run.json").read_text())
    assert described["add_bos"] is False
    seal(checkpoint, described | {"add_bos": True})
    recipe = checkpoint / "recipe"
    alone = run(recipe, tmp_path / "alone", 1)
    cut = run(recipe, tmp_path / "cut", 3, **{"parallel.tensor_model_parallel_size": 3})
    for a, b in zip(alone, cut, strict=True):
        assert a["lm_loss"] == pytest.approx(b["lm_loss"], abs=1e-5)
    assert alone[0]["lm_loss"] != pytest.approx(alone[1]["lm_loss"], abs=1e-3)
    assert bos_rule(checkpoint) and bos_rule(tmp_path / "cut")  # the run keeps the record
    # Training on shorter texts changes neither the limits nor the settings of the source.
    export_model(ExportOptions(tmp_path / "cut", tmp_path / "on", skip_parity=True), QUIET)
    trained = {name: json.loads((tmp_path / "on" / f"{name}.json").read_text()) for name in FILES}
    assert trained["config"]["max_position_embeddings"] == 64
    assert trained["tokenizer_config"]["model_max_length"] == 64
    assert generation.items() <= trained["generation_config"].items()


def test_olmoe_there_and_back_in_bf16(tmp_path):
    torch.manual_seed(0)
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
    model = OlmoeForCausalLM(OlmoeConfig(**(SIZES | moe)))
    folder = saved(model, tmp_path / "olmoe", torch.bfloat16)
    checkpoint, back = tmp_path / "checkpoint", tmp_path / "back"
    (report,) = run_on_ranks(import_and_back, 1, folder, checkpoint, back)
    assert report["parity"]["passed"]
    assert report["parity"]["weights"] == "bfloat16"
    assert_same_tensors(folder, back)
    config = json.loads((back / "config.json").read_text())
    assert (config["model_type"], config["norm_topk_prob"]) == ("olmoe", True)
    lines = run(
        checkpoint / "recipe",
        tmp_path / "run",
        2,
        **{"parallel.expert_model_parallel_size": 2, "training.bf16": False},
    )
    assert len(lines) == 2


def test_mistral_without_a_window(tmp_path):
    """With the weights a second time, and an id without embedding for padding."""
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None))
    folder = saved(model, tmp_path / "mistral")
    save_file({"tok_embeddings.weight": torch.ones(2, 2)}, folder / "consolidated.safetensors")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"pad_token_id": SIZES["vocab_size"]}))
    checkpoint, back = tmp_path / "checkpoint", tmp_path / "back"
    (report,) = run_on_ranks(import_and_back, 1, folder, checkpoint, back)
    assert report["parity"]["passed"]
    assert [note[:14] for note in report["notes"]] == ["`pad_token_id`"]
    (folder / "consolidated.safetensors").unlink()
    assert_same_tensors(folder, back)
    assert json.loads((back / "config.json").read_text())["model_type"] == "llama"
    for window in ({"sliding_window": 32}, {}):
        rest = {name: value for name, value in config.items() if name != "sliding_window"}
        path.write_text(json.dumps(rest | {"max_position_embeddings": 8192} | window))
        with pytest.raises(CheckpointError, match="has `sliding_window`: "):
            import_model(ImportOptions(folder, tmp_path / "other"), QUIET)


def test_exports_there_and_back(exported, tmp_path):
    for name, (folder, *_) in zip(
        ("dense", "per_expert"), exported("dense", "per_expert"), strict=True
    ):
        checkpoint, back = tmp_path / name, tmp_path / f"{name}-back"
        (report,) = run_on_ranks(import_and_back, 1, folder, checkpoint, back)
        assert report["parity"]["passed"]
        assert report["initialised"] == report["left"] == {}
        assert_same_tensors(folder, back)
        for file in ("config.json", "generation_config.json", "tokenizer.json"):
            assert (folder / file).read_text() == (back / file).read_text()


class ReleasedMLP(torch.nn.Module):
    """Fc2 act(fc1 x) with the activation's formula as it is published, highest power first."""

    def __init__(self, config, norm):
        super().__init__()
        self.up_proj = torch.nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = torch.nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = torch.nn.Module()
        self.act_fn.weight = torch.nn.Parameter(torch.tensor([0.2, -0.5, 0.9]))
        self.act_fn.bias = torch.nn.Parameter(torch.tensor([0.1]))
        self.norm = norm

    def forward(self, x):
        x = self.up_proj(x)

        def norm(u):
            return u / torch.sqrt(u.pow(2).mean(-1, keepdim=True) + 1e-6)

        weight, bias = self.act_fn.weight, self.act_fn.bias
        if self.norm:
            powers = norm(x**3), norm(x**2), norm(x)
        else:
            powers = torch.relu(x) ** 3, torch.relu(x) ** 2, torch.relu(x)
        return self.down_proj(sum(w * p for w, p in zip(weight, powers, strict=True)) + bias)


@pytest.mark.parametrize(("hidden_act", "norm"), [("PolyNorm", True), ("poly_relu", False)])
def test_polycom_release(tmp_path, hidden_act, norm):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    for layer in model.model.layers:
        layer.mlp = ReleasedMLP(model.config, norm)
    folder = saved(model, tmp_path / "release")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_act": hidden_act}))
    (report,) = run_on_ranks(import_and_back, 1, folder, tmp_path / "checkpoint", tmp_path / "back")
    assert report["parity"]["passed"]
    assert_same_tensors(folder, tmp_path / "back")
    # The comparison opens the folder by this project's code: here is one with none of it.
    from megapoly.conversion.transformers_model import load_transformers_model

    ids = torch.arange(40)[None] * 71 % 4000
    exported, _ = load_transformers_model(tmp_path / "back")
    with torch.no_grad():
        assert torch.allclose(exported(ids).logits, model.eval()(ids).logits, atol=1e-5)


def test_upcycling_takes_what_fits(tmp_path):
    folder = llama(tmp_path / "llama")
    checkpoint, back = tmp_path / "checkpoint", tmp_path / "back"
    options = {"activation": ActivationChange("polynorm", seed=7)}
    (report,) = run_on_ranks(import_and_back, 1, folder, checkpoint, back, options)
    assert report["parity"] is None
    before, after = tensors(folder), tensors(back)
    assert set(report["taken"]) == {name for name in before if ".mlp." not in name}
    for name in report["taken"]:
        assert torch.equal(before[name], after[name])
    assert set(report["left"]) == {name for name in before if ".mlp." in name}
    assert set(report["initialised"]) == set(after) - set(report["taken"])
    model = load_yaml(checkpoint / "config.yaml").model
    assert (model.activation, model.ffn_hidden_size) == ("polynorm", 90)  # 60 * 3 / 2
    key = "decoder.layers.mlp.linear_fc2.weight"
    fresh = initial_value(key, (1,), (48, 90), model, 7)
    assert torch.equal(after["model.layers.1.mlp.down_proj.weight"], fresh)
    assert after["model.layers.0.mlp.act_fn.weight"].tolist() == pytest.approx([1 / 3] * 3)
    assert after["model.layers.0.mlp.act_fn.bias"].item() == 0.0
    assert json.loads((checkpoint / "import.json").read_text()) == report
    lines = run(checkpoint / "recipe", tmp_path / "run", 1)
    assert len(lines) == 2


def test_the_recipe_has_what_is_not_default(tmp_path):
    folder, checkpoint = llama(tmp_path / "llama"), tmp_path / "checkpoint"
    run_on_ranks(import_only, 1, folder, checkpoint, {"skip_parity": True})
    recipe = yaml.safe_load((checkpoint / "recipe.yaml").read_text())
    assert recipe["checkpoint"] == {"load": str(checkpoint)}
    assert recipe["model"]["num_query_groups"] == 3
    assert "moe_router_topk" not in recipe["model"]
    assert json.loads((checkpoint / "run.json").read_text())["weights_only"]


def refused(folder, tmp_path, match, **options):
    with pytest.raises(CheckpointError, match=match):
        import_model(ImportOptions(folder, tmp_path / "checkpoint", **options), QUIET)
    assert not (tmp_path / "checkpoint").exists()
    assert not (tmp_path / ".checkpoint.partial").exists()


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder, change):
    (path,) = folder.glob("*.safetensors")
    found = load_file(path)
    change(found)
    save_file(found, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model_type": "gpt2"}, "llama, olmoe, megapoly.*gpt2"),
        ({"attention_bias": True}, "`attention_bias`: True"),
        ({"clip_qkv": 8.0}, "`clip_qkv`: 8.0"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "`rope_scaling.type`: dynamic"),
        ({"hidden_size": None, "vocab_size": "many"}, "must set hidden_size, vocab_size to whole"),
        ({"hidden_act": "gelu_new"}, "`hidden_act`.*gelu_new"),
        ({"num_hidden_layers": 3}, "`model.layers.2.* is missing"),
        ({"num_hidden_layers": 1}, "`model.layers.1.* is unknown"),
        ({"intermediate_size": 64}, r"is \(48, 60\), not \(48, 64\)"),
        ({"vocab_size": 4000}, r"is \(4099, 48\), not \(4000, 48\)"),
        ({"tie_word_embeddings": True}, "`lm_head.weight` is not `model.embed_tokens.weight`"),
    ],
)
def test_what_is_no_model_of_ours_is_refused(tmp_path, changes, match):
    folder = llama(tmp_path / "llama")
    change_config(folder, **changes)
    refused(folder, tmp_path, match)


def test_other_tensors_are_refused(tmp_path):
    folder = llama(tmp_path / "llama")
    change_tensors(folder, lambda found: found.update({"model.layers.0.mlp.bias": torch.ones(3)}))
    refused(folder, tmp_path, "`model.layers.0.mlp.bias` is unknown")
    change_tensors(folder, lambda found: found.pop("model.layers.0.mlp.bias"))
    # Constants that old releases of transformers saved with a model are not weights.
    change_tensors(
        folder,
        lambda found: found.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}),
    )
    import_model(ImportOptions(folder, tmp_path / "checkpoint", skip_parity=True), QUIET)
    names = set(CheckpointReader(tmp_path / "checkpoint").shapes)
    assert not any("inv_freq" in name for name in names)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    folder = llama(tmp_path / "llama")
    change_tensors(
        folder, lambda found: found["model.layers.1.mlp.up_proj.weight"].fill_(torch.inf)
    )
    refused(folder, tmp_path, "up_proj.weight` in .* has some", skip_parity=True)


@pytest.mark.parametrize(
    ("activation", "match"),
    [
        (ActivationChange("polynorm", order=7), "activation_order"),
        (ActivationChange("polynorme"), "nearest is polynorm"),
        (ActivationChange("polynorm", ffn_hidden_size=0), "ffn_hidden_size"),
    ],
)
def test_activations_that_training_refuses(tmp_path, activation, match):
    folder = llama(tmp_path / "llama")
    with pytest.raises(ConfigError, match=match):
        import_model(ImportOptions(folder, tmp_path / "out", activation=activation), QUIET)
    assert not (tmp_path / "out").exists()


def test_widths_for_the_same_number_of_parameters():
    model = ModelConfig(activation="swiglu", scale_gated_ffn=False, ffn_hidden_size=60)
    assert change_activation(model, ActivationChange("polynorm")).ffn_hidden_size == 90
    assert change_activation(model, ActivationChange("gated_polynorm")).ffn_hidden_size == 60
    assert (
        change_activation(model, ActivationChange("relu", ffn_hidden_size=7)).ffn_hidden_size == 7
    )
    model.activation = "relu"
    assert change_activation(model, ActivationChange("geglu")).ffn_hidden_size == 40
    model.ffn_hidden_size = 61
    with pytest.raises(ConfigError, match="--ffn-hidden-size"):
        change_activation(model, ActivationChange("geglu"))


def test_code_in_the_source_is_not_run(tmp_path):
    folder = llama(tmp_path / "llama")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    change_config(folder, auto_map={"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.C"})
    run_on_ranks(import_only, 1, folder, tmp_path / "checkpoint")
    assert not (tmp_path / "ran").exists()


def test_folders_without_weights_are_refused(tmp_path):
    folder = llama(tmp_path / "llama")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, tmp_path, "no .*safetensors.*save_pretrained")
    refused(tmp_path / "nothing", tmp_path, "config.json")


def test_a_truncated_file_is_refused(tmp_path):
    folder = llama(tmp_path / "llama")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(folder, tmp_path, "cannot be read as safetensors")


def test_a_tokenizer_with_more_ids_is_refused(tmp_path):
    folder = llama(tmp_path / "llama", vocab_size=4000)
    refused(folder, tmp_path, r"ids \(4096\).*`vocab_size` \(4000\)", skip_parity=True)


def test_file_has_the_blocks_of_the_folder(tmp_path):
    folder = llama(tmp_path / "llama")
    import_model(ImportOptions(folder, tmp_path / "checkpoint", skip_parity=True), QUIET)
    reader = CheckpointReader(tmp_path / "checkpoint")
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        parts = [file.get_tensor(f"model.layers.1.self_attn.{n}_proj.weight") for n in "qkv"]
        q, k, v = (part.view(3, -1, 48) for part in parts)
        qkv = reader.read("decoder.layers.self_attention.linear_qkv.weight", (1,))
        assert torch.equal(qkv.view(3, 32, 48), torch.cat([q, k, v], dim=1))
        gate, up = (file.get_tensor(f"model.layers.0.mlp.{n}_proj.weight") for n in ("gate", "up"))
        fc1 = reader.read("decoder.layers.mlp.linear_fc1.weight", (0,))
        assert torch.equal(fc1, torch.cat([gate, up]))
