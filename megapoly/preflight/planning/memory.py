"""Memory of one rank, in bytes: weights, gradients, optimizer state, activations, work space.

Activations are what the modules of this project's local spec keep for the backward pass; the
entries of :func:`layer_activations` and :func:`head_activations` are tensors that autograd saves,
and tests compare them with what it does save, and all of this with dry runs. With Transformer
Engine the same tensors are kept in other modules, in FP8 some of them in a byte instead of two;
that has not been measured.

Not in these figures, and the reason for :data:`HEADROOM`: the CUDA context and libraries, nccl's
buffers, and what the allocator cannot use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from megapoly.activations import registry
from megapoly.config import Config, ffn_width, padded_vocab_size
from megapoly.config.resolve import num_microbatches, sequence_parts
from megapoly.preflight.planning.parameters import counts_of_rank, stage_parts
from megapoly.preflight.planning.ranks import Grid

# Share of the device's memory that a layout has to leave free to count as fitting.
HEADROOM = 0.1

_FP32 = 4


class Saved(NamedTuple):
    """A tensor that is kept for the backward pass.

    Args:
        name: of the tensor, and of the module that keeps it.
        size: bytes for each token of the micro-batch on this rank (of seq_length / cp tokens).
        module: part of the layer: ``attention`` core, ``ffn`` (``mlp`` or ``moe`` of
            ``parallel.recompute_modules``), or '' for what no option recomputes alone.
    """

    name: str
    size: float
    module: str = ""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at the fullest moment of a step.

    Args:
        weights: parameters as the model computes with them; with FP8 these copies, too.
        gradients: fp32 buffers of all of them.
        optimizer: moments, and fp32 copies of bf16 weights; a share with the distributed optimizer.
        activations: kept for the backward pass, of all micro-batches that are under way.
        temporary: the largest tensors that live for a moment.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    temporary: int

    @property
    def total(self) -> int:
        """Sum of all."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.temporary


def memory_of_rank(config: Config, world_size: int, stage: int) -> Memory:
    """Memory of each rank of a pipeline stage.

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
    """The layers' matrices in FP8, by rows and by columns, that Transformer Engine keeps."""
    if config.training.fp8 is None:
        return 0
    matrices = ("attention", "FFN", "experts", "shared expert")
    return 2 * sum(part.on_rank for part in stage_parts(config, stage) if part.name in matrices)


def element_size(config: Config) -> int:
    """Bytes of a weight and of an activation."""
    return 2 if config.training.bf16 else _FP32


def tokens_of_rank(config: Config) -> int:
    """Tokens of a micro-batch on one rank, before sequence parallelism."""
    training = config.training
    samples = training.micro_batch_size * training.seq_length
    return samples // config.parallel.context_parallel_size


def optimizer_bytes_per_parameter(config: Config) -> int:
    """Two fp32 moments and, of bf16 weights, an fp32 copy."""
    return (3 if config.training.bf16 else 2) * _FP32


def updated_parameters(config: Config, world_size: int, stage: int) -> int:
    """Parameters that each rank of a pipeline stage updates: all it has, or its share of them."""
    counts = counts_of_rank(config, stage)
    if not config.parallel.use_distributed_optimizer:
        return counts.total
    sizes = Grid.of(config, world_size).sizes
    dense = -(-counts.dense // (sizes["dp"] * sizes["cp"]))
    return dense + -(-counts.routed // sizes["edp"])


def layer_activations(config: Config) -> list[Saved]:
    """What one layer keeps of one token.

    Args:
        config: resolved. Routing is taken to be balanced.
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
    # Values are a part of it. Ranks of a context that gather keys and values, or exchange heads,
    # keep what they then have instead; the core's inputs are kept where the core is recomputed.
    exchanged = parallel.cp_comm_type in ("all_gather", "a2a")
    recomputed = parallel.recompute_granularity == "selective"
    recomputed = recomputed and "core_attn" in parallel.recompute_modules
    if not exchanged or recomputed or model.qk_norm != "none":
        saved.append(Saved("queries, keys, values", (query + 2 * key) * item))
    if model.qk_norm != "none":
        norms = heads + model.num_query_groups / tensor if model.qk_norm == "head" else 2
        saved.append(Saved("statistics of QK-norms", norms * _FP32))
        if model.num_query_groups < model.num_attention_heads:
            # Heads of a group lie apart in what the projection made.
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
    """FC1's output, what the activation adds, FC2's input, for ``rows`` rows of a token."""
    activation = registry.get(config.model.activation)
    row = width * element_size(config) * rows
    saved = []
    if activation.keeps_input:  # others keep their output, which FC2 keeps, too
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
    """Rows of this rank's experts for each token of the micro-batch, with balanced routing."""
    parallel = config.parallel
    cut = sequence_parts(parallel)
    assert parallel.expert_tensor_parallel_size is not None, "resolve first"
    return config.model.moe_router_topk * parallel.expert_tensor_parallel_size / cut


def head_activations(config: Config) -> list[Saved]:
    """What final norm, output layer and loss keep of one token."""
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
    """Bytes a token that a recomputed layer keeps, and that it makes anew to go backward."""
    saved = layer_activations(config)
    everything = sum(entry.size for entry in saved)
    granularity = config.parallel.recompute_granularity
    if granularity is None:
        return everything, 0.0
    if granularity == "full":
        first = saved[0].size  # the layer's input
        return first, everything - first
    anew = sum(s.size for s in saved if s.module in config.parallel.recompute_modules)
    return everything - anew, anew


def _activation_bytes(config: Config, world_size: int, stage: int) -> float:
    is_last = stage == config.parallel.pipeline_model_parallel_size - 1
    under_way = chunks_under_way(config, world_size, stage)
    assert config.model.kv_channels is not None, "resolve first"
    frequencies = config.model.kv_channels * _FP32 / config.training.micro_batch_size
    kept = under_way * (_kept_by_chunk(config) + frequencies)
    # What goes to the next chunk is kept, too; the last chunk of all keeps the head's.
    kept += (under_way - is_last) * layer_activations(config)[0].size
    if is_last:
        kept += sum(saved.size for saved in head_activations(config))
    return tokens_of_rank(config) * kept


def _layers_of_chunk(config: Config) -> int:
    parallel = config.parallel
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    return config.model.num_layers // (parallel.pipeline_model_parallel_size * chunks)


def _kept_by_chunk(config: Config) -> float:
    """Bytes a token that the layers of a chunk keep."""
    parallel, layers = config.parallel, _layers_of_chunk(config)
    kept, anew = kept_by_layer(config)
    if parallel.recompute_granularity != "full":
        return layers * kept
    assert parallel.recompute_num_layers is not None, "the rules want it"
    if parallel.recompute_method == "uniform":
        return layers / parallel.recompute_num_layers * kept
    recomputed = min(parallel.recompute_num_layers, layers)
    return recomputed * kept + (layers - recomputed) * (kept + anew)


def _made_anew(config: Config) -> float:
    """Bytes a token that recomputation holds at once, beyond what was freed before it begins."""
    parallel, layers = config.parallel, _layers_of_chunk(config)
    kept, anew = kept_by_layer(config)
    if parallel.recompute_granularity != "full":
        return anew
    assert parallel.recompute_num_layers is not None, "the rules want it"
    if parallel.recompute_method == "uniform":
        together = parallel.recompute_num_layers
        return (together - 1) * kept + together * anew
    # Layers that are not recomputed come last, and go backward first.
    freed = max(0, layers - parallel.recompute_num_layers) * (kept + anew)
    return max(0.0, anew - freed)


def chunks_under_way(config: Config, world_size: int, stage: int) -> int:
    """Forward passes of a stage's chunk that wait for their backward pass, at most.

    One forward, one backward (pipeline_parallel/schedules.py of Megatron-Core 0.16.1).
    """
    parallel = config.parallel
    stages, batches = parallel.pipeline_model_parallel_size, num_microbatches(config, world_size)
    chunks = parallel.virtual_pipeline_model_parallel_size
    if chunks is None:
        return min(batches, stages - stage)
    warmup = (stages - stage - 1) * 2 + (chunks - 1) * stages
    return min(batches * chunks, warmup + 1)


def _temporary_bytes(config: Config, stage: int) -> float:
    """The most that is held for a moment: in the loss, or where a layer goes backward.

    With sequence parallelism the engine keeps one buffer for the gathered input of a matrix
    (tensor_parallel/layers.py of Megatron-Core 0.16.1).
    """
    parallel, item = config.parallel, element_size(config)
    tensor, model = parallel.tensor_model_parallel_size, config.model
    gradients = _gradients_of_ffn(config) * item
    logits = head = 0.0
    if stage == parallel.pipeline_model_parallel_size - 1:
        # In the model's precision beside the softmax in fp32, and later their gradient.
        logits = padded_vocab_size(config) / tensor * item
        head = sum(saved.size for saved in head_activations(config))
    buffer = model.hidden_size * item if parallel.sequence_parallel else 0
    most = max(logits, gradients - head, _made_anew(config) + gradients - head)
    return tokens_of_rank(config) * (most + buffer)


def _gradients_of_ffn(config: Config) -> float:
    """Numbers a token of the gradients that are held at once where an FFN goes backward."""
    model, parallel = config.model, config.parallel
    assert parallel.expert_tensor_parallel_size is not None, "resolve first"
    rows = 1 + registry.get(model.activation).gated, 1  # of FC1's output, FC2's input
    if not model.num_moe_experts:
        width = ffn_width(model, model.ffn_hidden_size) / parallel.tensor_model_parallel_size
        return sum(rows) * width
    assert model.moe_ffn_hidden_size is not None
    width = ffn_width(model, model.moe_ffn_hidden_size) / parallel.expert_tensor_parallel_size
    # Or of the experts' tokens, as they are sent, gathered and sorted: seen in dry runs.
    copies = 4 if parallel.expert_tensor_parallel_size == 1 else 6
    return rows_of_experts(config) * max(sum(rows) * width, copies * model.hidden_size)
