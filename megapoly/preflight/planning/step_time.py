"""A lower bound on the time of a step, which is an upper bound on MFU.

A stage's micro-batch takes at least the time of its matrix products at the device's peak, of its
other operators to read and write their operands once at the memory's bandwidth, and of the messages
that the engine waits for at the links' bandwidth. A pipeline takes at least

    max over stages of batches * (stage) + (sum of the stages before it) / chunks

since a stage's first micro-batch passes through the stages before it, and the gradient of its last
one passes back through them; stages behind it may work at the same time. Messages of data
parallelism that one micro-batch cannot hide, and the optimizer, are added. Real runs also have
kernels below the peak, latencies, launches, and imbalance of experts and of ranks. Sums in switches
(SHARP), which would halve the time of an all-reduce, are not assumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megapoly.activations import registry
from megapoly.config import Config, ffn_width, padded_vocab_size
from megapoly.config.resolve import num_microbatches, sequence_parts, tokens_per_step
from megapoly.platform.gpus import GPU
from megapoly.preflight.planning.collectives import Collective
from megapoly.preflight.planning.memory import (
    element_size,
    rows_of_experts,
    tokens_of_rank,
    updated_parameters,
)
from megapoly.preflight.planning.parameters import counts_of_rank
from megapoly.training.flops import (
    forward_flops_per_token,
    recomputed_flops_per_token,
    training_flops_per_token,
)

_DATA_AXES = {"dp", "edp"}
_FP32 = 4


@dataclass(frozen=True)
class StepTime:
    """Lower bound on the seconds of one step.

    Args:
        products: matrix products of the slowest stage, all micro-batches.
        operators: its other operators.
        messages: its messages that are waited for, without data parallelism.
        bubble: the work of the stages before the slowest, for one micro-batch.
        data_parallel: messages of data parallelism beyond what one micro-batch hides.
        optimizer: reading and writing the optimizer's state.
        tokens: tokens of a step.
        flops: model FLOPs of a step.
        peak: FLOPs of all devices in a second, at their peak.
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
        """Sum of all parts."""
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
        """Upper bound on model FLOPs utilization, a fraction of the devices' peak."""
        return self.flops / self.total / self.peak

    @property
    def tokens_per_second(self) -> float:
        """Upper bound on the tokens per second of the whole job."""
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


def step_time(
    config: Config, world_size: int, gpu: GPU, sent: Sequence[list[Collective]]
) -> StepTime:
    """Return the bound of a layout.

    Args:
        config: resolved.
        world_size: number of processes.
        gpu: GPU of every rank.
        sent: messages of a rank of each pipeline stage.
    """
    batches = num_microbatches(config, world_size)
    stages = [
        _Stage(
            products=_product_time(config, gpu, stage),
            operators=_operator_bytes(config, stage) / gpu.memory_bandwidth,
            messages=sum(c.time for c in sent[stage] if not _is_data(c) and not c.hidden) / batches,
        )
        for stage in range(len(sent))
    ]
    chunks = config.parallel.virtual_pipeline_model_parallel_size or 1
    slowest, before = pipeline_bound([stage.total for stage in stages], batches, chunks)
    # After the last backward pass of the slowest stage, the stages before it run theirs.
    exposed = [_exposed_time(messages, stage) for messages, stage in zip(sent, stages, strict=True)]
    ends = [(max(0.0, exposed[i] - waiting), i) for i, waiting in ((0, 0.0), (slowest, before))]
    data_parallel, last = max(ends)
    return StepTime(
        products=batches * stages[slowest].products,
        operators=batches * stages[slowest].operators,
        messages=batches * stages[slowest].messages,
        bubble=before,
        data_parallel=data_parallel,
        optimizer=_optimizer_bytes(config, world_size, last) / gpu.memory_bandwidth,
        tokens=tokens_per_step(config),
        flops=float(training_flops_per_token(config)) * tokens_per_step(config),
        peak=gpu.bf16_flops * world_size,
    )


def pipeline_bound(stages: Sequence[float], batches: int, chunks: int = 1) -> tuple[int, float]:
    """Return the stage that bounds a pipeline, and how long it waits for those before it.

    The pipeline takes at least ``batches * stages[slowest] + waiting``.

    Args:
        stages: seconds of one micro-batch, forward and backward.
        batches: number of micro-batches.
        chunks: number of interleaved chunks of a stage.
    """
    before = [sum(stages[:i]) / chunks for i in range(len(stages))]
    slowest = max(range(len(stages)), key=lambda i: batches * stages[i] + before[i])
    return slowest, before[slowest]


def _is_data(collective: Collective) -> bool:
    return bool(_DATA_AXES & set(collective.axes))


def _exposed_time(messages: list[Collective], stage: _Stage) -> float:
    """Return the seconds of messages that the last backward or first forward pass cannot hide."""
    data = [message for message in messages if _is_data(message)]
    hidden = sum(message.time for message in data if message.hidden)
    waited = sum(message.time for message in data if not message.hidden)
    return waited + max(0.0, hidden - stage.total)


def _product_time(config: Config, gpu: GPU, stage: int) -> float:
    """Return the seconds of a micro-batch's matrix products on one rank, with recomputation."""
    parallel = config.parallel
    forward = forward_flops_per_token(config)
    stages = parallel.pipeline_model_parallel_size
    output = 3 * forward.output_layer if stage == stages - 1 else 0
    layers = 3 * forward.layers / _rate_of_layers(config, gpu) + _recomputed_time(config, gpu)
    per_token = layers / stages + output / gpu.bf16_flops
    return tokens_of_rank(config) / parallel.tensor_model_parallel_size * per_token


def _recomputed_time(config: Config, gpu: GPU) -> float:
    """Return the seconds of a token's recomputed products, of whole layers or of modules."""
    parallel, recomputed = config.parallel, recomputed_flops_per_token(config)
    if config.training.fp8 is None or parallel.recompute_granularity == "full":
        return recomputed / _rate_of_layers(config, gpu)
    assert gpu.fp8_flops is not None, "the rules refuse FP8 on such a GPU"
    in_bf16 = 0
    if "core_attn" in parallel.recompute_modules and recomputed:
        in_bf16 = forward_flops_per_token(config).attention_scores
    return in_bf16 / gpu.bf16_flops + (recomputed - in_bf16) / gpu.fp8_flops


def _rate_of_layers(config: Config, gpu: GPU) -> float:
    """Return the peak of a layer's products: linear layers in FP8 if enabled, the rest in bf16."""
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
    """Return the least bytes that a micro-batch's operators without matrix products move.

    Each reads its operands and writes its results once: a norm 2 forward and 3 backward, a residual
    sum 3 and 1, a rotation 2 and 2, an activation 2 and 3 (gated 3 and 5, in which the two halves
    count separately); the loss reads and writes logits in fp32. Experts' rows are copied from the
    tokens and summed to tokens, forward and backward, and sorted by expert before and after the
    experts if a rank has several. A weight's gradient is read and added to its fp32 sum, unless the
    product does that.
    """
    model, parallel = config.model, config.parallel
    assert model.kv_channels is not None and model.num_query_groups is not None
    tensor, item = parallel.tensor_model_parallel_size, element_size(config)
    cut = sequence_parts(parallel)
    keys = (model.num_attention_heads + model.num_query_groups) * model.kv_channels / tensor
    # In FP8 a norm before a linear map may write a byte for two.
    in_a_byte = 0.0 if config.training.fp8 is None else 0.5 if model.num_moe_experts else 1.0
    layer = (2 * 5 + 2 * 4 - in_a_byte) * model.hidden_size / cut + 4 * keys
    if model.qk_norm != "none":
        layer += 5 * keys
    gated = registry.get(model.activation).gated
    passes = 8 if gated else 5
    if model.num_moe_experts:
        assert model.moe_ffn_hidden_size is not None
        assert parallel.expert_tensor_parallel_size is not None, "resolve first"
        rows = rows_of_experts(config)
        width = ffn_width(model, model.moe_ffn_hidden_size) / parallel.expert_tensor_parallel_size
        layer += rows * passes * width + _permuted(config) * model.hidden_size
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
    added = 0 if config.training.gradient_accumulation_fusion else item + 2 * _FP32
    return tokens_of_rank(config) * per_token + counts_of_rank(config, stage).total * added


def _permuted(config: Config) -> float:
    """Return the rows of the hidden size that dispatching a token moves, forward and backward."""
    model, parallel = config.model, config.parallel
    rows = rows_of_experts(config)
    if model.moe_token_dispatcher_type == "allgather":
        return 4 * rows
    assert model.num_moe_experts is not None
    cut = sequence_parts(parallel)
    copied = 4 * (model.moe_router_topk + 1) / cut
    has_several = model.num_moe_experts > parallel.expert_model_parallel_size
    return copied + (8 * rows if has_several else 0)


def _optimizer_bytes(config: Config, world_size: int, stage: int) -> float:
    """Return the bytes that the optimizer moves: gradients twice, moments, weights."""
    copies = 2 * 3 * _FP32 + (2 if config.training.bf16 else 0)
    return updated_parameters(config, world_size, stage) * float(2 * _FP32 + copies)
