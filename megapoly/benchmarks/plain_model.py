"""A dense decoder in plain PyTorch, the reference of ``training.py``.

Pre-norm layers of causal self-attention with rotary positions and SwiGLU; untied embeddings, no
biases: the ``dense_tiny`` recipe with ``activation: swiglu``, without the engine.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from megapoly.config import Config, ffn_width, padded_vocab_size
from megapoly.errors import ConfigError


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[b, s, h] -> [b, s, h]; ``cos`` and ``sin`` are [s, head width / 2]."""
        batch, seq_length, _ = x.shape
        qkv = self.qkv(x).view(batch, seq_length, 3, self.num_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # [b, heads, s, d] each
        query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
        output = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.proj(output.transpose(1, 2).reshape(x.shape))


class SwiGLU(nn.Module):
    """FC2 (silu(a) u); a and u are the halves of the output of FC1."""

    def __init__(self, hidden_size: int, ffn_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, 2 * ffn_size, bias=False)
        self.fc2 = nn.Linear(ffn_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[b, s, h] -> [b, s, h]."""
        activated, up = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(F.silu(activated) * up)


class Layer(nn.Module):
    """Attention and FFN, each with a normalised input and added to the residual stream."""

    def __init__(self, hidden_size: int, num_heads: int, ffn_size: int, eps: float) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(hidden_size, eps)
        self.attention = Attention(hidden_size, num_heads)
        self.ffn_norm = nn.RMSNorm(hidden_size, eps)
        self.ffn = SwiGLU(hidden_size, ffn_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[b, s, h] -> [b, s, h]."""
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.ffn(self.ffn_norm(x))


class PlainModel(nn.Module):
    """The model of a configuration as one module of plain PyTorch.

    Args:
        config: resolved; dense, SwiGLU, untied embeddings, as many key heads as query heads.

    Raises:
        ConfigError: the configuration requires something that this model does not have.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        check_is_plain(config)
        model, hidden_size = config.model, config.model.hidden_size
        self.num_heads = model.num_attention_heads
        self.vocab_size, padded_size = model.vocab_size, padded_vocab_size(config)
        ffn_size = ffn_width(model, model.ffn_hidden_size)
        self.embedding = nn.Embedding(padded_size, hidden_size)
        self.layers = nn.ModuleList(
            Layer(hidden_size, self.num_heads, ffn_size, model.normalization_eps)
            for _ in range(model.num_layers)
        )
        self.norm = nn.RMSNorm(hidden_size, model.normalization_eps)
        self.output = nn.Linear(hidden_size, padded_size, bias=False)

        half = hidden_size // self.num_heads // 2
        frequencies = model.rotary_base ** (-torch.arange(half) / half)
        angles = torch.outer(torch.arange(config.training.seq_length), frequencies)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross-entropy of ``labels`` after ``tokens``, both [b, s], in nats."""
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        logits = self.output(self.norm(x))[..., : self.vocab_size]
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    @torch.no_grad()
    def copy_weights(self, engine_model: nn.Module) -> None:
        """Copy the weights of the engine's GPT model of the same configuration."""
        weights: dict[str, Tensor] = {}
        for engine_name, weight in engine_model.named_parameters():
            name = _plain_name(engine_name)
            weights[name] = weight
            if name.endswith("qkv.weight"):  # rows are [heads, q k v, d] in the engine
                rows = weight.view(self.num_heads, 3, -1, weight.shape[-1])
                weights[name] = rows.transpose(0, 1).reshape(weight.shape)
        self.load_state_dict(weights)

    def optimizer(self, config: Config) -> torch.optim.AdamW:
        """Return AdamW with the constants of the configuration; norm weights do not decay."""
        settings = config.optimizer
        groups: list[dict[str, Any]] = [
            {"params": [p for p in self.parameters() if p.dim() > 1]},
            {"params": [p for p in self.parameters() if p.dim() == 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            groups,
            lr=settings.lr,
            betas=(settings.adam_beta1, settings.adam_beta2),
            eps=settings.adam_eps,
            weight_decay=settings.weight_decay,
            fused=True,
        )


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (j, j + d / 2) of the last dimension by its position's angle."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


_ENGINE_NAMES = {
    "embedding.word_embeddings": "embedding",
    "decoder.layers": "layers",
    "decoder.final_layernorm": "norm",
    "output_layer": "output",
    "input_layernorm": "attention_norm",
    "self_attention.linear_qkv": "attention.qkv",
    "self_attention.linear_proj": "attention.proj",
    "pre_mlp_layernorm": "ffn_norm",
    "mlp.linear_fc": "ffn.fc",
}


def _plain_name(engine_name: str) -> str:
    for engine_part, part in _ENGINE_NAMES.items():
        engine_name = engine_name.replace(engine_part, part)
    return engine_name


def check_is_plain(config: Config) -> None:
    """Raise :class:`ConfigError` if :class:`PlainModel` does not support the configuration."""
    model = config.model
    wanted = {
        "model.activation": (model.activation, "swiglu"),
        "model.num_moe_experts": (model.num_moe_experts, None),
        "model.num_query_groups": (model.num_query_groups, model.num_attention_heads),
        "model.kv_channels": (model.kv_channels, model.hidden_size // model.num_attention_heads),
        "model.qk_norm": (model.qk_norm, "none"),
        "model.untie_embeddings_and_output_weights": (
            model.untie_embeddings_and_output_weights,
            True,
        ),
        "model.hidden_dropout": (model.hidden_dropout, 0.0),
        "model.attention_dropout": (model.attention_dropout, 0.0),
        "training.bf16": (config.training.bf16, False),
    }
    problems = [
        f"`{name}` ({value}) must be {expected}: the plain model supports nothing else"
        for name, (value, expected) in wanted.items()
        if value != expected
    ]
    if problems:
        raise ConfigError(problems)
