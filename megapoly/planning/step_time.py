"""A lower bound on the time of a step, and so an upper bound on MFU.

A stage's micro-batch takes at least what its matrix products need at the device's peak, what its
other operators need to read and write their operands once at the memory's bandwidth, and what its
messages need that the engine waits for at the links' bandwidth. A pipeline takes at least

    batches * (slowest stage) + (sum of the other stages) / chunks

then come what data parallelism cannot hide behind one micro-batch, and the optimizer. Kernels below
the peak, latencies, launches, imbalance of experts and of ranks come on top in every real run.
"""

from __future__ import annotations

from dataclasses import dataclass

from megapoly.activations import registry
from megapoly.config import Config, ffn_width, padded_vocab_size
from megapoly.config.resolve import num_microbatches, tokens_per_step
from megapoly.planning.collectives import Collective, collectives
from megapoly.planning.memory import element_size, rows_of_experts, tokens_of_rank
from megapoly.planning.parameters import counts_of_rank
from megapoly.planning.ranks import Grid
from megapoly.platform.gpus import GPU
from megapoly.training.flops import (
    forward_flops_per_token,
    recomputed_flops_per_token,
    training_flops_per_token,
)

_DATA_AXES = {"dp", "edp"}
_FP32 = 4


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step, at least.

    Args:
        products: matrix products of the slowest stage, all micro-batches.
        operators: its other operators.
        messages: its messages that are waited for, without those of data parallelism.
        bubble: waiting of the slowest stage for the others.
        data_parallel: messages of data parallelism beyond what one micro-batch hides.
        optimizer: reading and writing the optimizer's state.
        tokens: of a step.
        flops: model FLOPs of a step.
        peak: model FLOPs that all devices could make in a second.
    """

    products: float
    operators: float
    messages: float
    bubble: float
    data_parallel: float
    optimizer: float
    tokens: int
    flops: float
    peak: float

    @property
    def total(self) -> float:
        """Seconds."""
        return (
            self.products
            + self.operators
            + self.messages
            + self.bubble
            + self.data_parallel
            + self.optimizer
        )

    @property
    def mfu(self) -> float:
        """Model FLOPs by the devices' peak, at most; a fraction."""
        return self.flops / self.total / self.peak

    @property
    def tokens_per_second(self) -> float:
        """Of the whole job, at most."""
        return self.tokens / self.total


@dataclass(frozen=True)
class _Stage:
    """Seconds of one micro-batch of one stage, forward and backward."""

    products: float
    operators: float
    messages: float

    @property
    def total(self) -> float:
        return self.products + self.operators + self.messages


def step_time(config: Config, world_size: int, gpu: GPU) -> StepTime:
    """The bound of a layout.

    Args:
        config: resolved.
        world_size: processes.
        gpu: of every rank.
    """
    num_stages = config.parallel.pipeline_model_parallel_size
    sent = [collectives(config, world_size, gpu, stage) for stage in range(num_stages)]
    batches = num_microbatches(config, world_size)
    stages = [
        _Stage(
            products=_product_time(config, gpu, stage),
            operators=_operator_bytes(config, stage) / gpu.memory_bandwidth,
            messages=sum(c.time for c in sent[stage] if not _is_data(c) and not c.hidden) / batches,
        )
        for stage in range(num_stages)
    ]
    slowest = max(stages, key=lambda stage: stage.total)
    chunks = config.parallel.virtual_pipeline_model_parallel_size or 1
    others = sum(stage.total for stage in stages) - slowest.total
    return StepTime(
        products=batches * slowest.products,
        operators=batches * slowest.operators,
        messages=batches * slowest.messages,
        bubble=others / chunks,
        data_parallel=max(
            _exposed_time(messages, stage) for messages, stage in zip(sent, stages, strict=True)
        ),
        optimizer=max(
            _optimizer_bytes(config, world_size, stage) / gpu.memory_bandwidth
            for stage in range(num_stages)
        ),
        tokens=tokens_per_step(config),
        flops=float(training_flops_per_token(config)) * tokens_per_step(config),
        peak=gpu.bf16_flops * world_size,
    )


def _is_data(collective: Collective) -> bool:
    return bool(_DATA_AXES & set(collective.axes))


def _exposed_time(messages: list[Collective], stage: _Stage) -> float:
    """Gradients may hide behind the last backward pass, weights behind the first forward pass."""
    data = [message for message in messages if _is_data(message)]
    hidden = sum(message.time for message in data if message.hidden)
    waited = sum(message.time for message in data if not message.hidden)
    return waited + max(0.0, hidden - stage.total)


def _product_time(config: Config, gpu: GPU, stage: int) -> float:
    """Seconds of a micro-batch's matrix products on one rank, recomputed ones included."""
    parallel = config.parallel
    forward = forward_flops_per_token(config)
    stages = parallel.pipeline_model_parallel_size
    layers = 3 * forward.layers + recomputed_flops_per_token(config)
    output = 3 * forward.output_layer if stage == stages - 1 else 0
    per_token = layers / stages / _rate_of_layers(config, gpu) + output / gpu.bf16_flops
    return tokens_of_rank(config) / parallel.tensor_model_parallel_size * per_token


def _rate_of_layers(config: Config, gpu: GPU) -> float:
    """FLOPs a second of a layer's products: linear maps in FP8 if that is on, the rest in bf16."""
    if config.training.fp8 is None:
        return gpu.bf16_flops
    assert gpu.fp8_flops is not None, "the rules refuse FP8 on such a GPU"
    forward, layers = forward_flops_per_token(config), config.model.num_layers
    in_bf16 = forward.attention_scores + forward.router
    in_fp8 = forward.layers - in_bf16
    if config.training.first_last_layers_bf16:
        in_bf16 += in_fp8 * 2 // layers
        in_fp8 = forward.layers - in_bf16
    return forward.layers / (in_fp8 / gpu.fp8_flops + in_bf16 / gpu.bf16_flops)


def _operator_bytes(config: Config, stage: int) -> float:
    """Bytes that a micro-batch's operators without matrix products read and write, at least.

    Each reads its operands and writes its results once: a norm 2 forward and 3 backward, a residual
    sum 3 and 1, a rotation 2 and 2, an activation 2 and 3 (gated 3 and 5, of which the halves
    count apart), a permutation of the experts' rows 2 and 2; the loss reads and writes logits in
    fp32. The gradient of each weight is added to its fp32 sum.
    """
    model, parallel = config.model, config.parallel
    assert model.kv_channels is not None and model.num_query_groups is not None
    tensor, item = parallel.tensor_model_parallel_size, element_size(config)
    cut = tensor if parallel.sequence_parallel else 1
    keys = (model.num_attention_heads + model.num_query_groups) * model.kv_channels / tensor
    layer = (2 * 5 + 2 * 4) * model.hidden_size / cut + 4 * keys
    if model.qk_norm != "none":
        layer += 5 * keys
    gated = registry.get(model.activation).gated
    passes = 8 if gated else 5
    if model.num_moe_experts:
        assert model.moe_ffn_hidden_size is not None
        assert parallel.expert_tensor_parallel_size is not None, "resolve first"
        rows = rows_of_experts(config)
        width = ffn_width(model, model.moe_ffn_hidden_size) / parallel.expert_tensor_parallel_size
        layer += rows * (passes * width + 2 * 4 * model.hidden_size)
        if model.moe_shared_expert_intermediate_size:
            shared = ffn_width(model, model.moe_shared_expert_intermediate_size)
            layer += passes * shared / tensor
    else:
        layer += passes * ffn_width(model, model.ffn_hidden_size) / tensor
    stages = parallel.pipeline_model_parallel_size
    per_token = layer * item * model.num_layers / stages
    if stage == stages - 1:
        logits = padded_vocab_size(config) / tensor
        per_token += 5 * model.hidden_size / cut * item + logits * (2 * item + 4 * _FP32)
    # Written, read again and added, or added where it is made.
    written = 0 if config.training.gradient_accumulation_fusion else 2 * item
    gradients = counts_of_rank(config, stage).total * (written + 2 * _FP32)
    return tokens_of_rank(config) * per_token + gradients


def _optimizer_bytes(config: Config, world_size: int, stage: int) -> float:
    """Bytes that the optimizer reads and writes: gradients twice, moments, weights."""
    counts, sizes = counts_of_rank(config, stage), Grid.of(config, world_size).sizes
    dense, routed = float(counts.dense), float(counts.routed)
    if config.parallel.use_distributed_optimizer:
        dense, routed = dense / (sizes["dp"] * sizes["cp"]), routed / sizes["edp"]
    copies = 2 * 3 * _FP32 + (2 if config.training.bf16 else 0)
    return (dense + routed) * (2 * _FP32 + copies)
