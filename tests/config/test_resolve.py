from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from megapoly.config import resolve as sizes
from megapoly.config.parsing import load_yaml, to_yaml
from megapoly.config.rules import find_problems
from megapoly.config.schema import BlendSource, Config, ModelConfig, TrainingConfig
from megapoly.errors import ConfigError
from megapoly.platform.machine import CPU, Machine

RECIPES = sorted((Path(__file__).parents[2] / "examples" / "configs").glob("*.yaml"))


def resolve(config: Config, **facts: Any) -> Config:
    defaults = {
        "tokenizer_vocab_size": 4096,
        "machine": CPU,
    }
    return sizes.resolve(config, **(defaults | facts))


def make(**training: Any) -> Config:
    return Config(training=TrainingConfig(**({"train_iters": 10} | training)))


def test_every_null_that_stands_for_a_value_is_filled() -> None:
    config = make()
    config.parallel.tensor_model_parallel_size = 2
    config.run_dir = "out"
    resolved = resolve(config)
    assert resolved.model.num_query_groups == 4
    assert resolved.model.kv_channels == 64
    assert resolved.model.vocab_size == 4096
    assert resolved.model.transformer_engine is False
    assert resolved.parallel.expert_tensor_parallel_size == 2
    assert resolved.parallel.sequence_parallel is True
    assert resolved.optimizer.lr_warmup_iters == 0
    assert resolved.optimizer.lr_decay_iters == 10
    assert resolved.training.device == "cpu"
    assert resolved.training.calculate_per_token_loss is False
    assert resolved.data.cache_dir == "out/cache"


@pytest.mark.parametrize(
    ("given", "masks", "expected"),
    [(None, True, True), (None, False, False), (False, True, False), (True, False, True)],
)
def test_mean_over_tokens_is_the_default_where_tokens_are_masked(
    given: bool | None, masks: bool, expected: bool
) -> None:
    config = make(calculate_per_token_loss=given)
    config.data.eod_mask_loss = masks
    assert resolve(config).training.calculate_per_token_loss is expected


def test_nulls_that_mean_none_stay() -> None:
    resolved = resolve(make())
    assert resolved.model.num_moe_experts is None
    assert resolved.model.moe_ffn_hidden_size is None
    assert resolved.optimizer.lr_wsd_decay_iters is None
    assert resolved.parallel.recompute_granularity is None


def test_explicit_values_stay() -> None:
    config = make(device="cpu")
    config.model.num_query_groups, config.model.kv_channels = 2, 32
    config.model.vocab_size, config.data.cache_dir = 5000, "elsewhere"
    config.model.num_moe_experts, config.model.moe_ffn_hidden_size = 8, 384
    config.parallel.tensor_model_parallel_size = 2
    config.parallel.expert_tensor_parallel_size = 1
    resolved = resolve(config, machine=Machine(cuda=True))
    assert (resolved.model.num_query_groups, resolved.model.kv_channels) == (2, 32)
    assert (resolved.model.vocab_size, resolved.data.cache_dir) == (5000, "elsewhere")
    assert resolved.model.moe_ffn_hidden_size == 384
    assert resolved.parallel.expert_tensor_parallel_size == 1
    assert resolved.training.device == "cpu"


def test_experts_default_to_the_dense_width() -> None:
    config = make()
    config.model.num_moe_experts, config.model.ffn_hidden_size = 8, 768
    assert resolve(config).model.moe_ffn_hidden_size == 768


def test_kernels_are_taken_where_they_are_installed() -> None:
    config = make()
    config.model.num_moe_experts = 8
    everything = Machine(cuda=True, transformer_engine=True, apex=True)
    resolved = resolve(config, machine=everything)
    assert resolved.model.apply_rope_fusion is True
    assert resolved.model.moe_permute_fusion is True
    assert resolved.training.gradient_accumulation_fusion is True
    assert resolve(make(), machine=everything).model.moe_permute_fusion is None  # dense
    for machine in (CPU, Machine(cuda=True)):
        resolved = resolve(config, machine=machine)
        assert resolved.model.apply_rope_fusion is False
        assert resolved.model.moe_permute_fusion is False
        assert resolved.training.gradient_accumulation_fusion is False


@pytest.mark.parametrize("experts", [None, 8])
def test_a_run_of_gpus_becomes_one_of_cpu(experts: int | None) -> None:
    config = make(bf16=True, fp8="hybrid", fp8_recipe="delayed", fp8_amax_history_len=4)
    config.model.num_moe_experts = experts
    on_gpu = resolve(config, machine=Machine(cuda=True, transformer_engine=True, apex=True))
    on_cpu = copy.deepcopy(on_gpu)
    sizes.without_gpu_kernels(on_cpu)
    assert find_problems(on_cpu, world_size=1, machine=CPU) == []
    expected = make(bf16=True)
    expected.model.num_moe_experts = experts
    assert on_cpu == resolve(expected)


@pytest.mark.parametrize(
    ("cuda", "installed", "device", "engine"),
    [
        (False, False, "cpu", False),
        (False, True, "cpu", False),
        (True, False, "cuda", False),
        (True, True, "cuda", True),
    ],
)
def test_device_and_engine_follow_the_machine(
    cuda: bool, installed: bool, device: str, engine: bool
) -> None:
    resolved = resolve(make(), machine=Machine(cuda=cuda, transformer_engine=installed))
    assert (resolved.training.device, resolved.model.transformer_engine) == (device, engine)


def test_tokens_become_steps_and_their_form_is_cleared() -> None:
    config = make(train_iters=None, train_tokens=2_048_001)  # 2,048 tokens a step
    optimizer = config.optimizer
    optimizer.lr_warmup_tokens, optimizer.lr_decay_tokens = 3_071, 1_025 * 2_048
    optimizer.lr_decay_style, optimizer.lr_wsd_decay_tokens = "WSD", 3_072
    resolved = resolve(config)
    assert resolved.training.train_iters == 1001  # up
    assert resolved.optimizer.lr_warmup_iters == 1  # nearest
    assert resolved.optimizer.lr_decay_iters == 1025
    assert resolved.optimizer.lr_wsd_decay_iters == 2  # a half goes up
    assert resolved.training.train_tokens is None
    assert resolved.optimizer.lr_warmup_tokens is None
    assert resolved.optimizer.lr_decay_tokens is None
    assert resolved.optimizer.lr_wsd_decay_tokens is None


@pytest.mark.parametrize(
    ("tokens", "sequences", "steps"),
    [(620_000_000, 64, 2365), (10_486_000_000, 1024, 2500)],
)
def test_warmup_of_the_paper(tokens: int, sequences: int, steps: int) -> None:
    config = make(train_iters=10_000, seq_length=4096, global_batch_size=sequences)
    config.optimizer.lr_warmup_tokens = tokens
    assert resolve(config).optimizer.lr_warmup_iters == steps


def test_argument_is_left_as_it_is() -> None:
    config = make()
    before = copy.deepcopy(config)
    resolve(config).parallel.recompute_modules.append("mlp")
    assert config == before


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_resolved_recipe_resolves_to_itself(path: Path, tmp_path: Path) -> None:
    facts = {"machine": Machine(cuda=True, transformer_engine=True)}
    config = load_yaml(path)
    config.data.blend = config.data.validation = config.data.tokenizer = None
    resolved = resolve(config, **facts)
    assert resolve(resolved, **facts) == resolved
    (tmp_path / "resolved.yaml").write_text(to_yaml(resolved), encoding="utf-8")
    again = load_yaml(tmp_path / "resolved.yaml")
    assert again == resolved
    laptop = path.stem.endswith(("tiny", "miniature"))
    world_size = 1 if laptop else 32
    assert not find_problems(again, world_size=world_size, tokenizer_vocab_size=4096, **facts)


@pytest.mark.parametrize(
    ("activation", "scaled", "size", "width"),
    [
        ("swiglu", True, 8256, 5504),
        ("swiglu", True, 1536, 1024),
        ("gated_polynorm", True, 1536, 1024),
        ("swiglu", False, 5504, 5504),
        ("polynorm", True, 8256, 8256),
        ("gelu", True, 8256, 8256),
    ],
)
def test_ffn_width(activation: str, scaled: bool, size: int, width: int) -> None:
    assert (
        sizes.ffn_width(ModelConfig(activation=activation, scale_gated_ffn=scaled), size) == width
    )


def test_ffn_width_of_unknown_activation() -> None:
    with pytest.raises(ConfigError, match="swiglu"):
        sizes.ffn_width(ModelConfig(activation="swigl"), 96)


@pytest.mark.parametrize(
    ("vocab", "multiple", "tensor", "padded"),
    [
        (50_280, 128, 1, 50_304),
        (32_000, 128, 1, 32_000),
        (50_304, 128, 1, 50_304),
        (1, 128, 1, 128),
        (5, 1, 1, 5),
        (50_280, 128, 8, 50_304),
        (50_280, 1, 8, 50_280),
        (50_280, 1, 16, 50_288),
        (50_280, 128, 3, 50_304),
        (32_000, 128, 3, 32_256),
        (509, 1, 4, 512),
        (509, 6, 4, 516),
    ],
)
def test_padded_vocab_size(vocab: int, multiple: int, tensor: int, padded: int) -> None:
    config = Config()
    config.model.vocab_size, config.model.make_vocab_size_divisible_by = vocab, multiple
    config.parallel.tensor_model_parallel_size = tensor
    assert sizes.padded_vocab_size(config) == padded


def test_sizes_of_a_layout() -> None:
    config = make(global_batch_size=64, micro_batch_size=2, seq_length=4096)
    config.parallel.tensor_model_parallel_size = 2
    config.parallel.pipeline_model_parallel_size = 2
    assert sizes.data_parallel_size(config, 32) == 8
    assert sizes.num_microbatches(config, 32) == 4
    assert sizes.tokens_per_step(config) == 262_144


def test_a_run_that_ends_within_its_warmup_decays_after_it() -> None:
    config = Config()
    config.training.train_iters, config.optimizer.lr_warmup_iters = 5, 10
    assert resolve(config).optimizer.lr_decay_iters == 11
    config.training.train_iters = 50
    assert resolve(config).optimizer.lr_decay_iters == 50


def test_sources_get_their_names_and_a_prefix_is_one_epoch() -> None:
    config = make()
    config.data.blend = [
        "data/wiki",
        BlendSource("cc/*_text", epochs=2.0),
        BlendSource("b", 1.0, name="x"),
    ]
    resolved = resolve(config)
    assert resolved.data.blend == [
        BlendSource("data/wiki", epochs=1.0, name="wiki"),
        BlendSource("cc/*_text", epochs=2.0, name="*_text"),
        BlendSource("b", weight=1.0, name="x"),
    ]
    assert resolve(resolved) == resolved
