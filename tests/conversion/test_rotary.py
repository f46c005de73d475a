"""Rotary fields of a config.json are computed as transformers does, or refused by name."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megapoly.config import ModelConfig
from megapoly.conversion.architecture import hf_config, model_config
from megapoly.errors import CheckpointError

WIDTH, LENGTH = 8, 64
MODEL = ModelConfig(
    hidden_size=48,
    num_attention_heads=6,
    num_query_groups=6,
    kv_channels=WIDTH,
    vocab_size=99,
)
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "longrope": LONGROPE | {"factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": LLAMA3,
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.5},
    "su": {"type": "su", "short_factor": [1.0], "long_factor": [1.0]},
    "mrope": {"type": "default", "mrope_section": [2, 1, 1]},
}
PLAIN = {"rope_type": "default", "rope_theta": 10_000.0}


def config_of(kind):
    """The content of a config.json of an architecture, with no rotary field."""
    changes = {"llama": {"activation": "swiglu"}, "megapoly": {"activation": "polynorm"}}
    moe = {"activation": "swiglu", "qk_norm": "full", "num_moe_experts": 4}
    fields = vars(MODEL) | changes.get(kind, moe | {"moe_ffn_hidden_size": 60})
    made = hf_config(
        ModelConfig(**fields), seq_length=LENGTH, dtype="float32", bos=None, eos=0, pad=None
    )
    assert made["model_type"] == kind
    return {k: v for k, v in made.items() if k not in ("rope_parameters", "rope_theta")}


@pytest.mark.parametrize("kind", ["llama", "olmoe", "megapoly"])
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("place", ["rope_parameters", "rope_scaling"])
def test_every_scaling_is_refused_in_either_field(kind, scaling, place):
    config = config_of(kind) | {place: SCALINGS[scaling]}
    others = [{}, {"rope_theta": 5e5}]
    if place == "rope_scaling":
        others.append({"rope_parameters": PLAIN})
    for other in others:
        with pytest.raises(CheckpointError, match=rf"config.json has `{place}\."):
            model_config(config | other, source="config.json")


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor`: 0.5"),
        ({"partial_rotary_factor": 0.0}, "partial_rotary_factor`: 0.0"),
        ({"rope_parameters": PLAIN | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor`"),
        ({"rope_parameters": {"full_attention": PLAIN}}, "rope_parameters.full_attention`"),
        ({"rope_parameters": PLAIN | {"factor": 2.0}}, "rope_parameters.factor`: 2.0"),
        ({"rope_scaling": "dynamic"}, "rope_scaling`: dynamic"),
        ({"original_max_position_embeddings": 16}, "original_max_position_embeddings`: 16"),
        ({"sliding_window": 32}, "sliding_window`: 32"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types`"),
        ({"attention_chunk_size": 16}, "attention_chunk_size`: 16"),
        ({"no_rope_layers": [1, 0, 1, 1]}, "no_rope_layers`"),
        ({"rope_interleaved": True}, "rope_interleaved`"),
        ({"rope_parameters": PLAIN, "rope_theta": 5e5}, "`rope_theta` 500000.0"),
        ({"rope_theta": 5e5, "rope_scaling": {"rope_theta": 1e4}}, "must agree"),
        ({"rope_theta": 10_000.5}, "whole number"),
    ],
)
def test_what_changes_positions_is_refused_by_name(changes, name):
    with pytest.raises(CheckpointError, match=name):
        model_config(config_of("llama") | changes, source="config.json")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_theta": 5e5},
        {"rope_theta": None, "rope_parameters": PLAIN | {"rope_theta": 5e5}},
        {"rope_theta": 5e5, "rope_scaling": None, "rope_parameters": PLAIN | {"rope_theta": 5e5}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "default"}},
        {"rope_theta": 5e5, "rope_scaling": {}, "partial_rotary_factor": 1.0},
        {"original_max_position_embeddings": LENGTH, "sliding_window": None},
        {"sliding_window": 4096, "layer_types": ["full_attention"] * 4},
        {"sliding_window": 16, "use_sliding_window": False},
        {"no_rope_layers": [1] * 4},
    ],
)
def test_the_plain_embedding_in_every_spelling(changes):
    """Cosines of transformers at the last positions, from the base that is read."""
    config = config_of("llama") | changes
    base = model_config(config, source="config.json").rotary_base
    fields = {k: v for k, v in config.items() if k != "rope_theta" or v is not None}
    embedding = LlamaRotaryEmbedding(LlamaConfig(**fields))
    positions = torch.tensor([[0, 1, LENGTH - 1]])
    cos, _ = embedding(torch.zeros(1), positions)
    powers = base ** (-torch.arange(0, WIDTH, 2, dtype=torch.float64) / WIDTH)
    by_hand = (positions[0, :, None] * powers).cos().float()
    assert torch.allclose(cos[0, :, : WIDTH // 2], by_hand, atol=1e-6)
