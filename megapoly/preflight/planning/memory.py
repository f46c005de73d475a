"""Memory of one rank, in bytes: weights, gradients, optimizer, activations, temporary tensors.

Activations are what the modules of this project's local spec keep for the backward pass: the
entries of :func:`layer_activations` and :func:`head_activations` are tensors that autograd saves.
Tests compare them with what it saves, and all figures with dry runs. With Transformer Engine other
modules keep the same tensors, in FP8 some of them in one byte instead of two; that has not been
measured.

:data:`HEADROOM` is for what these figures leave out: the CUDA context and libraries, NCCL's
buffers, and fragments of the allocator.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from megapoly.activations import registry
from megapoly.config import Config, ffn_width, padded_vocab_size
from megapoly.config.resolve import num_microbatches, sequence_parts
from megapoly.preflight.planning.parameters import counts_of_rank, stage_parts
from megapoly.preflight.planning.rank_grid import RankGrid

# Share of the device's memory that a layout must leave free to fit.
HEADROOM = 0.1

_FP32 = 4


class Saved(NamedTuple):
    """A tensor that is kept for the backward pass.

    Args:
        name: name of the tensor, and of the module that keeps it.
        size: bytes for each token of the micro-batch on this rank (of seq_length / cp tokens).
        module: entry of ``parallel.recompute_modules`` that recomputes it (``core_attn``, ``mlp``
            or ``moe``); '': none does.
    """

    name: str
    size: float
    module: str = ""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at the peak of a step.

    Args:
        weights: parameters in the precision of the computation; with FP8 also the FP8 copies.
        gradients: fp32 buffers of all of them.
        optimizer: moments, and fp32 copies of bf16 weights; a share with the distributed optimizer.
        activations: kept for the backward pass, of all micro-batches in flight.
        temporary: the largest tensors that exist for a short time.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    temporary: int

    @property
    def total(self) -> int:
        """Sum of all five."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.temporary


def memory_of_rank(config: Config, world_size: int, stage: int) -> Memory:
    """Return the memory of each rank of a pipeline stage.

    Args:
        config: resolved.
        world_size: processes.
        stage: pipeline stage.
    """
    counts = counts_of_rank(config, stage)
    return Memory(
        weights=counts.total * element_size(config) + _fp8_copies(config, stage),
        gradients=counts.total * _FP32,
        optimizer=updated_parameters(config, world_size, stage)
        * optimizer_bytes_per_parameter(config),
        activations=round(_activation_bytes(config, world_size, stage)),
        temporary=round(_temporary_bytes(config, stage)),
    )


def _fp8_copies(config: Config, stage: int) -> int:
    """Return the bytes of the FP8 copies, by rows and by columns, of the layers' matrices."""
    if config.training.fp8 is None:
        return 0
    matrices = ("attention", "FFN", "experts", "shared expert")
    return 2 * sum(part.on_rank for part in stage_parts(config, stage) if part.name in matrices)


def element_size(config: Config) -> int:
    """Return the bytes of one element of a weight or an activation."""
    return 2 if config.training.bf16 else _FP32


def tokens_of_rank(config: Config) -> int:
    """Return the tokens of a micro-batch on one rank, before sequence parallelism."""
    training = config.training
    samples = training.micro_batch_size * training.seq_length
    return samples // config.parallel.context_parallel_size


def optimizer_bytes_per_parameter(config: Config) -> int:
    """Return the bytes of two fp32 moments and, for bf16 weights, of an fp32 copy."""
    return (3 if config.training.bf16 else 2) * _FP32


def updated_parameters(config: Config, world_size: int, stage: int) -> int:
    """Return how many parameters each rank of a pipeline stage updates: all, or its shard."""
    counts = counts_of_rank(config, stage)
    if not config.parallel.use_distributed_optimizer:
        return counts.total
    sizes = RankGrid.of(config, world_size).sizes
    dense = -(-counts.dense // (sizes["dp"] * sizes["cp"]))
    return dense + -(-counts.routed // sizes["edp"])


def layer_activations(config: Config) -> list[Saved]:
    """Return what one layer keeps for one token.

    Args:
        config: resolved. Routing is assumed to be balanced.
    """
    model, parallel = config.model, config.parallel
    assert model.kv_channels is not None and model.num_query_groups is not None
    tensor, item = parallel.tensor_model_parallel_size, element_size(config)
    cut = sequence_parts(parallel)
    hidden = model.hidden_size * item / cut
    statistic = _FP32 / cut
    heads = model.num_attention_heads / tensor
    query = heads * model.kv_channels
    key = model.num_query_groups * model.kv_channels / tensor
    saved = [
        Saved("input of the attention norm", hidden),
        Saved("statistic of the attention norm", statistic),
        Saved("input of the QKV projection", hidden),
    ]
    # The values are part of this tensor. Context-parallel ranks that gather keys and values, or
    # exchange heads, keep the results instead; where the core is recomputed, its inputs are kept.
    exchanged = parallel.cp_comm_type in ("all_gather", "a2a")
    recomputed = parallel.recompute_granularity == "selective"
    recomputed = recomputed and "core_attn" in parallel.recompute_modules
    if not exchanged or recomputed or model.qk_norm != "none":
        saved.append(Saved("queries, keys, values", (query + 2 * key) * item))
    if model.qk_norm != "none":
        norms = heads + model.num_query_groups / tensor if model.qk_norm == "head" else 2
        saved.append(Saved("statistics of QK-norms", norms * _FP32))
        if model.num_query_groups < model.num_attention_heads:
            # Heads of a group are not contiguous in the projection's output.
            saved.append(Saved("queries in the order of heads", query * item))
    # Sines and cosines, for queries and for keys, are the same for every sample.
    rotation = 4 * model.kv_channels * item / config.training.micro_batch_size
    saved.append(Saved("rotation of queries and keys", rotation))
    if not exchanged or recomputed:
        saved.append(Saved("rotated queries and keys", (query + key) * item))
    if exchanged:
        ranks = parallel.context_parallel_size if parallel.cp_comm_type == "all_gather" else 1
        inside = 2 * query + 2 * key * ranks  # queries, the core's output, keys and values
        saved.append(Saved("attention over the context", inside * item, "core_attn"))
    saved += [
        Saved("logarithms of the softmax sums", heads * _FP32, "core_attn"),
        Saved("output of attention", query * item),
        Saved("input of the FFN norm", hidden),
        Saved("statistic of the FFN norm", statistic),
        Saved("input of the FFN", hidden),
    ]
    if model.hidden_dropout:
        saved.append(Saved("masks of dropout", 2 * model.hidden_size / cut))
    return saved + (_moe_activations(config, cut) if model.num_moe_experts else _dense_ffn(config))


def _dense_ffn(config: Config) -> list[Saved]:
    width = ffn_width(config.model, config.model.ffn_hidden_size)
    saved = _ffn(config, width / config.parallel.tensor_model_parallel_size, rows=1.0)
    return [entry._replace(module="mlp") for entry in saved]


def _ffn(config: Config, width: float, rows: float, *, is_routed: bool = False) -> list[Saved]:
    """Return FC1's output, what the activation keeps, and FC2's input, for rows of a token."""
    activation = registry.get(config.model.activation)
    row = width * element_size(config) * rows
    saved = []
    if activation.keeps_input:  # others keep their output, which FC2 keeps as well
        saved.append(Saved("output of FC1", row * (2 if activation.gated else 1)))
    if not activation.has_coefficients:
        if activation.gated:
            saved.append(Saved("activated half", row))
        if is_routed:
            saved.append(Saved("output of the activation", row))
    if activation.normalized:
        saved.append(Saved("roots of PolyNorm", config.model.activation_order * _FP32 * rows))
    return [*saved, Saved("input of FC2", row)]


def _moe_activations(config: Config, cut: int) -> list[Saved]:
    model, parallel = config.model, config.parallel
    assert model.num_moe_experts is not None and model.moe_ffn_hidden_size is not None
    assert parallel.expert_tensor_parallel_size is not None, "resolve first"
    rows = rows_of_experts(config)
    width = ffn_width(model, model.moe_ffn_hidden_size) / parallel.expert_tensor_parallel_size
    scores = (4 * _FP32 + 1) * model.num_moe_experts + _FP32
    choices = 3 * 8 * model.moe_router_topk
    saved = [
        Saved("scores and choices of the router", (scores + choices) / cut),
        Saved("tokens of the experts", model.hidden_size * element_size(config) * rows),
        Saved("probabilities of the experts", _FP32 * rows),
        *_ffn(config, width, rows, is_routed=True),
    ]
    if model.moe_shared_expert_intermediate_size:
        shared = ffn_width(model, model.moe_shared_expert_intermediate_size)
        saved += _ffn(config, shared / parallel.tensor_model_parallel_size, rows=1.0)
    return [entry._replace(module="moe") for entry in saved]


def rows_of_experts(config: Config) -> float:
    """Return the rows of this rank's experts for each token, with balanced routing."""
    parallel = config.parallel
    cut = sequence_parts(parallel)
    assert parallel.expert_tensor_parallel_size is not None, "resolve first"
    return config.model.moe_router_topk * parallel.expert_tensor_parallel_size / cut


def head_activations(config: Config) -> list[Saved]:
    """Return what final norm, output layer and loss keep for one token."""
    parallel, hidden = config.parallel, config.model.hidden_size * element_size(config)
    tensor = parallel.tensor_model_parallel_size
    cut = sequence_parts(parallel)
    return [
        Saved("input of the final norm", hidden / cut),
        Saved("statistic of the final norm", _FP32 / cut),
        Saved("input of the output layer", hidden / cut),
        Saved("softmax over the vocabulary", padded_vocab_size(config) / tensor * _FP32),
        Saved("targets and their mask", 8 + 1),
    ]


def kept_by_layer(config: Config) -> tuple[float, float]:
    """Return the bytes per token that a layer keeps, and that its backward pass recomputes."""
    saved = layer_activations(config)
    everything = sum(entry.size for entry in saved)
    granularity = config.parallel.recompute_granularity
    if granularity is None:
        return everything, 0.0
    if granularity == "full":
        first = saved[0].size  # the layer's input
        return first, everything - first
    again = sum(s.size for s in saved if s.module in config.parallel.recompute_modules)
    return everything - again, again


def _activation_bytes(config: Config, world_size: int, stage: int) -> float:
    is_last = stage == config.parallel.pipeline_model_parallel_size - 1
    in_flight = chunks_in_flight(config, world_size, stage)
    assert config.model.kv_channels is not None, "resolve first"
    frequencies = config.model.kv_channels * _FP32 / config.training.micro_batch_size
    kept = in_flight * (_kept_by_chunk(config) + frequencies)
    # The output for the next chunk is kept as well; the last chunk of all keeps the head's.
    kept += (in_flight - is_last) * layer_activations(config)[0].size
    if is_last:
        kept += sum(saved.size for saved in head_activations(config))
    return tokens_of_rank(config) * kept


def _layers_of_chunk(config: Config) -> int:
    parallel = config.parallel
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    return config.model.num_layers // (parallel.pipeline_model_parallel_size * chunks)


def _kept_by_chunk(config: Config) -> float:
    """Return the bytes per token that the layers of a chunk keep."""
    parallel, layers = config.parallel, _layers_of_chunk(config)
    kept, again = kept_by_layer(config)
    if parallel.recompute_granularity != "full":
        return layers * kept
    assert parallel.recompute_num_layers is not None, "the rules want it"
    if parallel.recompute_method == "uniform":
        return layers / parallel.recompute_num_layers * kept
    recomputed = min(parallel.recompute_num_layers, layers)
    return recomputed * kept + (layers - recomputed) * (kept + again)


def _recomputed(config: Config) -> float:
    """Return the bytes per token that recomputation adds, beyond what was freed before."""
    parallel, layers = config.parallel, _layers_of_chunk(config)
    kept, again = kept_by_layer(config)
    if parallel.recompute_granularity != "full":
        return again
    assert parallel.recompute_num_layers is not None, "the rules want it"
    if parallel.recompute_method == "uniform":
        together = parallel.recompute_num_layers
        return (together - 1) * kept + together * again
    # Layers that are not recomputed are the last, and run their backward passes first.
    freed = max(0, layers - parallel.recompute_num_layers) * (kept + again)
    return max(0.0, again - freed)


def chunks_in_flight(config: Config, world_size: int, stage: int) -> int:
    """Return the maximum of a stage's forward passes that wait for their backward pass.

    The schedule is one forward, one backward (pipeline_parallel/schedules.py of Megatron-Core
    0.16.1).
    """
    parallel = config.parallel
    stages, batches = parallel.pipeline_model_parallel_size, num_microbatches(config, world_size)
    chunks = parallel.virtual_pipeline_model_parallel_size
    if chunks is None:
        return min(batches, stages - stage)
    warmup = (stages - stage - 1) * 2 + (chunks - 1) * stages
    return min(batches * chunks, warmup + 1)


def _temporary_bytes(config: Config, stage: int) -> float:
    """Return the bytes of temporary tensors: in the loss, or in the backward pass of a layer.

    With sequence parallelism the engine keeps one buffer for the gathered input of a matrix
    (tensor_parallel/layers.py of Megatron-Core 0.16.1).
    """
    parallel, item = config.parallel, element_size(config)
    tensor, model = parallel.tensor_model_parallel_size, config.model
    gradients = _gradients_of_ffn(config) * item
    logits = head = 0.0
    if stage == parallel.pipeline_model_parallel_size - 1:
        # In the model's precision, with the softmax in fp32, and later their gradient.
        logits = padded_vocab_size(config) / tensor * item
        head = sum(saved.size for saved in head_activations(config))
    buffer = model.hidden_size * item if parallel.sequence_parallel else 0
    most = max(logits, gradients - head, _recomputed(config) + gradients - head)
    return tokens_of_rank(config) * (most + buffer)


def _gradients_of_ffn(config: Config) -> float:
    """Return the elements per token of the gradients held at once in an FFN's backward pass."""
    model, parallel = config.model, config.parallel
    assert parallel.expert_tensor_parallel_size is not None, "resolve first"
    rows = 1 + registry.get(model.activation).gated, 1  # of FC1's output, FC2's input
    if not model.num_moe_experts:
        width = ffn_width(model, model.ffn_hidden_size) / parallel.tensor_model_parallel_size
        return sum(rows) * width
    assert model.moe_ffn_hidden_size is not None
    width = ffn_width(model, model.moe_ffn_hidden_size) / parallel.expert_tensor_parallel_size
    # Or of the experts' tokens, which are sent, gathered and sorted: measured in dry runs.
    copies = 4 if parallel.expert_tensor_parallel_size == 1 else 6
    return rows_of_experts(config) * max(sum(rows) * width, copies * model.hidden_size)
