"""The number of parameters of a model, and of each rank."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megapoly.activations import registry
from megapoly.config import Config, ffn_width, padded_vocab_size


@dataclass(frozen=True)
class ModelPart:
    """Parameters of one kind, of one layer or of an end of the model.

    Args:
        name: name in tables.
        total: number in the model.
        on_rank: number on a rank that holds a shard of them.
        routed: whether each expert has its own.
    """

    name: str
    total: int
    on_rank: int
    routed: bool = False


@dataclass(frozen=True)
class Counts:
    """Parameters of a rank, by the group that reduces their gradients.

    Args:
        dense: reduced over the data-parallel group.
        routed: parameters of experts, reduced over the expert-data-parallel group.
    """

    dense: int
    routed: int

    @property
    def total(self) -> int:
        """Sum of both."""
        return self.dense + self.routed


def layer_parts(config: Config) -> list[ModelPart]:
    """Return the parameters of one transformer layer.

    Args:
        config: resolved.
    """
    model, parallel = config.model, config.parallel
    assert model.kv_channels is not None and model.num_query_groups is not None
    tensor, hidden = parallel.tensor_model_parallel_size, model.hidden_size
    query = model.num_attention_heads * model.kv_channels
    key = model.num_query_groups * model.kv_channels

    def split(name: str, size: int) -> ModelPart:
        return ModelPart(name, size, size // tensor)

    def replicated(name: str, size: int) -> ModelPart:
        return ModelPart(name, size, size)

    parts = [
        split("attention", hidden * (2 * query + 2 * key)),
        replicated("norms", 2 * hidden),
    ]
    if model.qk_norm == "head":
        parts.append(replicated("QK-norm", 2 * model.kv_channels))
    if model.qk_norm == "full":
        parts.append(split("QK-norm", query + key))
    coefficients = num_coefficients(config)
    if not model.num_moe_experts:
        parts += [
            split("FFN", ffn_parameters(config, model.ffn_hidden_size)),
            replicated("activation", coefficients),
        ]
        return parts
    assert model.moe_ffn_hidden_size is not None
    experts, on_rank = (
        model.num_moe_experts,
        model.num_moe_experts // parallel.expert_model_parallel_size,
    )
    expert = ffn_parameters(config, model.moe_ffn_hidden_size)
    assert parallel.expert_tensor_parallel_size is not None, "resolve first"
    share = expert // parallel.expert_tensor_parallel_size
    parts += [
        replicated("router", hidden * experts),
        ModelPart("experts", experts * expert, on_rank * share, routed=True),
    ]
    if model.activation_coefficients == "per_expert":
        parts.append(
            ModelPart("activation", experts * coefficients, on_rank * coefficients, routed=True)
        )
    else:
        parts.append(replicated("activation", coefficients))
    if model.moe_shared_expert_intermediate_size:
        shared = ffn_parameters(config, model.moe_shared_expert_intermediate_size)
        parts += [split("shared expert", shared), replicated("shared activation", coefficients)]
    return [part for part in parts if part.total]


def ffn_parameters(config: Config, size: int) -> int:
    """Return the number of elements of FC1 and FC2.

    Args:
        config: resolved.
        size: one of the FFN widths of the configuration, before a gate's two thirds.
    """
    matrices = 3 if registry.get(config.model.activation).gated else 2
    return matrices * config.model.hidden_size * ffn_width(config.model, size)


def num_coefficients(config: Config) -> int:
    """Return the number of coefficients of one activation."""
    activation = registry.get(config.model.activation)
    if activation.coefficients is None:
        return 0
    vectors = activation.coefficients(config.model.activation_order)
    return sum(len(values) for values in vectors.values())


def embedding_part(config: Config) -> ModelPart:
    """Return the input embedding, on the first pipeline stage, with padding of the vocabulary."""
    size = padded_vocab_size(config) * config.model.hidden_size
    return ModelPart("embedding", size, size // config.parallel.tensor_model_parallel_size)


def output_parts(config: Config) -> list[ModelPart]:
    """Return final norm and output layer, on the last pipeline stage.

    With tied embeddings the model has no output layer, but a last stage that is not the first has
    a copy of the embedding.
    """
    embedding, hidden = embedding_part(config), config.model.hidden_size
    norm = ModelPart("final norm", hidden, hidden)
    if config.model.untie_embeddings_and_output_weights:
        return [norm, ModelPart("output layer", embedding.total, embedding.on_rank)]
    if config.parallel.pipeline_model_parallel_size > 1:
        return [norm, ModelPart("copy of the embedding", 0, embedding.on_rank)]
    return [norm]


def stage_parts(config: Config, stage: int) -> list[ModelPart]:
    """Return every part of a pipeline stage, parts of layers once for each layer."""
    stages = config.parallel.pipeline_model_parallel_size
    parts = layer_parts(config) * (config.model.num_layers // stages)
    if stage == 0:
        parts = [embedding_part(config), *parts]
    if stage == stages - 1:
        parts += output_parts(config)
    return parts


def counts_of_rank(config: Config, stage: int) -> Counts:
    """Return the parameters of each rank of a pipeline stage."""
    parts = stage_parts(config, stage)
    return Counts(
        dense=sum(part.on_rank for part in parts if not part.routed),
        routed=sum(part.on_rank for part in parts if part.routed),
    )


def model_parts(config: Config) -> list[ModelPart]:
    """Return every part of the model, summed over layers; ``on_rank`` is for one layer."""
    layers = config.model.num_layers
    inner = [ModelPart(p.name, p.total * layers, p.on_rank, p.routed) for p in layer_parts(config)]
    parts = [embedding_part(config), *inner, *output_parts(config)]
    return [part for part in parts if part.total]


def total_parameters(config: Config) -> int:
    """Return the number of parameters of the model, with padding of the vocabulary."""
    return _sum(model_parts(config))


def active_parameters(config: Config) -> int:
    """Return the number of parameters that one token uses: all except unused experts."""
    model = config.model
    if not model.num_moe_experts:
        return total_parameters(config)
    routed = _sum(part for part in model_parts(config) if part.routed)
    idle = model.num_moe_experts - model.moe_router_topk
    return total_parameters(config) - routed // model.num_moe_experts * idle


def _sum(parts: Iterable[ModelPart]) -> int:
    return sum(part.total for part in parts)
