"""Every message of one step: its group, its bytes, its number of calls, and the link it crosses.

Sizes are for Megatron-Core 0.16.1 and the operators here. Messages of a few numbers per
layer or step are left out: router statistics, gradient norm, losses, coefficients of activations.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megapoly.activations import registry
from megapoly.activations.registry import TensorParallelSum
from megapoly.config import Config
from megapoly.config.resolve import num_microbatches, sequence_parts
from megapoly.ops.collectives import NUM_SEGMENTS
from megapoly.platform.gpus import GPU
from megapoly.preflight.planning.memory import element_size, rows_of_experts, tokens_of_rank
from megapoly.preflight.planning.parameters import counts_of_rank, embedding_part, layer_parts
from megapoly.preflight.planning.rank_grid import GroupLink, RankGrid

Kind = Literal["all-gather", "reduce-scatter", "all-reduce", "all-to-all", "send"]
_FP32, _FP64 = 4, 8


@dataclass(frozen=True)
class Collective:
    """One kind of message of a rank.

    Args:
        name: what is sent.
        kind: kind of collective; an all-reduce counts as a reduce-scatter and an all-gather.
        axes: axes that the group spans, see :mod:`megapoly.preflight.planning.rank_grid`.
        size: bytes of one call: of the whole tensor, or of all that one rank holds before
            (``all-to-all``, ``send``).
        calls: number of calls in one step.
        link: what connects the group.
        hidden: whether the engine computes at the same time.
    """

    name: str
    kind: Kind
    axes: tuple[str, ...]
    size: float
    calls: float
    link: GroupLink
    hidden: bool = False

    @property
    def sent_bytes(self) -> float:
        """Bytes that one rank sends in a step, at least."""
        if self.kind == "send":
            return self.size * self.calls
        share = (self.link.size - 1) / self.link.size
        return self.size * self.calls * share * (2 if self.kind == "all-reduce" else 1)

    @property
    def time(self) -> float:
        """Seconds of a step, at least."""
        if self.kind == "send":
            return self.calls * self.link.send_time(self.size)
        if self.kind == "all-to-all":
            return self.calls * self.link.exchange_time(self.size)
        times = 2 if self.kind == "all-reduce" else 1
        return self.calls * times * self.link.gather_time(self.size)


class _Counter:
    """Sizes, numbers of passes and groups that several collectives need."""

    def __init__(self, config: Config, world_size: int, gpu: GPU, stage: int) -> None:
        self.config, self.stage = config, stage
        self.grid = RankGrid.of(config, world_size)
        self.gpu = gpu
        self.item = element_size(config)
        self.tokens: float = tokens_of_rank(config)
        self.batches = num_microbatches(config, world_size)
        self.layers = config.model.num_layers // self.grid.sizes["pp"]
        self.is_first, self.is_last = stage == 0, stage == self.grid.sizes["pp"] - 1
        # Ranks of a pipeline stage are numbered one after another.
        self.first_rank = world_size // self.grid.sizes["pp"] * stage

    def make(
        self,
        name: str,
        kind: Kind,
        axes: tuple[str, ...],
        size: float,
        calls: float,
        *,
        hidden: bool = False,
    ) -> Iterator[Collective]:
        """Yield the message, unless its group is one rank or it is never sent."""
        group = self.grid.group(*axes, rank=self.first_rank)
        if len(group) > 1 and calls and size:
            link = GroupLink.between(group, self.gpu)
            yield Collective(name, kind, axes, size, calls, link, hidden)

    def forwards(self, module: str) -> float:
        """Return the forward passes of a module of a layer in a step, recomputed ones included."""
        parallel, again = self.config.parallel, 0.0
        if parallel.recompute_granularity == "selective":
            again = float(module in parallel.recompute_modules)
        if parallel.recompute_granularity == "full":
            again = 1.0
            if parallel.recompute_method == "block":
                chunks = parallel.virtual_pipeline_model_parallel_size or 1
                assert parallel.recompute_num_layers is not None, "the rules want it"
                again = parallel.recompute_num_layers * chunks / self.layers
        return self.layers * self.batches * (1.0 + again)

    @property
    def backwards(self) -> int:
        """Backward passes of a module of a layer in a step."""
        return self.layers * self.batches


def collectives(config: Config, world_size: int, gpu: GPU, stage: int) -> list[Collective]:
    """Return what each rank of a pipeline stage sends in one step.

    Args:
        config: resolved.
        world_size: processes.
        gpu: of every rank.
        stage: pipeline stage.
    """
    counter = _Counter(config, world_size, gpu, stage)
    return [
        *_tensor_parallel(counter),
        *_row_statistics(counter),
        *_expert_parallel(counter),
        *_context_parallel(counter),
        *_pipeline(counter),
        *_data_parallel(counter),
    ]


def _tensor_parallel(counter: _Counter) -> Iterator[Collective]:
    """Yield activations around the matrices that tensor parallelism splits."""
    config = counter.config
    hidden = counter.tokens * config.model.hidden_size * counter.item
    model = config.model
    has_cut_ffn = not model.num_moe_experts or bool(model.moe_shared_expert_intermediate_size)
    ffn = "moe" if model.num_moe_experts else "mlp"
    forward = counter.forwards("attention") + has_cut_ffn * counter.forwards(ffn)
    backward = counter.backwards * (1 + has_cut_ffn)
    batches = counter.batches
    axes = ("tp",)
    if not config.parallel.sequence_parallel:
        ends = batches * (counter.is_first + counter.is_last)
        yield from counter.make(
            "activations, tensor", "all-reduce", axes, hidden, forward + batches * counter.is_first
        )
        calls = backward + ends - batches * counter.is_first
        # The engine computes the weight's gradient at the same time (tensor_parallel/layers.py).
        yield from counter.make("gradients, tensor", "all-reduce", axes, hidden, calls, hidden=True)
    else:
        first, last = batches * counter.is_first, batches * counter.is_last
        gathers, scatters = forward + last, forward + first
        yield from counter.make("activations, tensor", "all-gather", axes, hidden, gathers)
        yield from counter.make("activations, tensor", "reduce-scatter", axes, hidden, scatters)
        name = "gradients, tensor"
        yield from counter.make(name, "all-gather", axes, hidden, backward + first)
        # While the gradients of input and weight are computed.
        calls = backward + last
        yield from counter.make(name, "reduce-scatter", axes, hidden, calls, hidden=True)
        name = "inputs again, tensor"
        yield from counter.make(name, "all-gather", axes, hidden, calls, hidden=True)
    if counter.is_last:
        losses = counter.tokens * _FP32
        yield from counter.make("loss, tensor", "all-reduce", axes, losses, 3 * batches)


def _row_statistics(counter: _Counter) -> Iterator[Collective]:
    """Yield sums over rows that are split over ranks: PolyNorm, QK-norm over the projection."""
    config = counter.config
    model, tokens = config.model, counter.tokens
    if model.qk_norm == "full":
        size, calls = tokens * _FP32, 2 * (counter.forwards("attention") + counter.backwards)
        yield from counter.make("QK-norm statistics", "all-reduce", ("tp",), size, calls)
    what = registry.get(model.activation).tensor_parallel_sum
    rows: list[tuple[tuple[str, ...], float, bool]] = []
    if model.num_moe_experts:
        rows.append((("etp",), tokens * rows_of_experts(config), True))
    if not model.num_moe_experts or model.moe_shared_expert_intermediate_size:
        rows.append((("tp",), tokens, False))
    # A sum in a fixed order gathers the segments of all ranks.
    kind: Kind = "all-gather" if model.activation_deterministic else "all-reduce"
    for axes, number, is_routed in rows:
        number *= NUM_SEGMENTS if model.activation_deterministic else 1
        if what is TensorParallelSum.STATISTICS:
            # Recomputation keeps the statistics.
            size = number * model.activation_order * _FP64
            yield from counter.make("activation statistics", kind, axes, size, counter.backwards)
            size = number * (model.activation_order + 1) * _FP32
        elif what is TensorParallelSum.GRADIENTS and is_routed:
            size = number * _FP64
        else:
            continue
        name = "activation gradient sums"
        yield from counter.make(name, kind, axes, size, counter.backwards)


def _expert_parallel(counter: _Counter) -> Iterator[Collective]:
    """Yield tokens to their experts and back, forward and backward, with balanced routing."""
    config = counter.config
    model, parallel = config.model, config.parallel
    if not model.num_moe_experts:
        return
    cut = sequence_parts(parallel)
    tokens = counter.tokens / cut
    forwards, backwards = counter.forwards("moe"), counter.backwards
    row, score = model.hidden_size * counter.item, _router_item(config)
    # The experts' results are summed over ranks in the router's precision (token_dispatcher.py).
    added = model.hidden_size * score
    if model.moe_token_dispatcher_type == "allgather":
        axes = ("etp", "ep")
        whole = tokens * len(counter.grid.group(*axes))
        scores = whole * model.num_moe_experts * score
        chosen = whole * model.num_moe_experts  # a byte each
        gathered: tuple[tuple[str, Kind, float, float], ...] = (
            ("tokens to all experts", "all-gather", whole * row, forwards),
            ("tokens back from experts", "reduce-scatter", whole * added, forwards),
            ("gradients to all experts", "all-gather", whole * added, backwards),
            ("gradients of tokens", "reduce-scatter", whole * row, backwards),
            ("routes to all experts", "all-gather", scores + chosen, forwards),
            ("gradients of routes", "reduce-scatter", scores, backwards),
        )
        for name, kind, size, calls in gathered:
            yield from counter.make(name, kind, axes, size, calls)
        return
    rows, passes = tokens * model.moe_router_topk, forwards + backwards
    whole = rows * counter.grid.sizes["etp"]
    sent: tuple[tuple[str, Kind, str, float, float], ...] = (
        ("tokens to experts", "all-to-all", "ep", rows * (row + score), passes),
        ("tokens back from experts", "all-to-all", "ep", rows * row, passes),
        ("tokens, expert tensor", "all-gather", "etp", whole * (row + score), forwards),
        ("results, expert tensor", "reduce-scatter", "etp", whole * added, forwards),
        ("gradients, expert tensor", "all-gather", "etp", whole * added, backwards),
        ("gradients, expert tensor", "reduce-scatter", "etp", whole * (row + score), backwards),
    )
    for name, kind, axis, size, calls in sent:
        yield from counter.make(name, kind, (axis,), size, calls)


def _router_item(config: Config) -> int:
    """Return the bytes of a router score."""
    precision = config.model.moe_router_dtype
    return element_size(config) if precision is None else {"fp32": _FP32, "fp64": _FP64}[precision]


def _context_parallel(counter: _Counter) -> Iterator[Collective]:
    """Yield keys and values, or heads, of ranks that share sequences."""
    config = counter.config
    model, parallel = config.model, config.parallel
    assert model.kv_channels is not None and model.num_query_groups is not None
    tensor = parallel.tensor_model_parallel_size
    query = model.num_attention_heads * model.kv_channels / tensor
    keys = 2 * model.num_query_groups * model.kv_channels / tensor
    tokens, axes = counter.tokens, ("cp",)
    forward, backward = counter.forwards("core_attn"), counter.backwards
    if parallel.cp_comm_type == "a2a":
        size = tokens * (2 * query + keys) * counter.item
        yield from counter.make(
            "heads for tokens, context", "all-to-all", axes, size, forward + backward
        )
        return
    size = tokens * keys * counter.item * counter.grid.sizes["cp"]
    ring = parallel.cp_comm_type == "p2p"  # Transformer Engine's, at the same time as attention
    name = "keys and values, context"
    yield from counter.make(name, "all-gather", axes, size, forward + ring * backward, hidden=ring)
    name = "their gradients, context"
    yield from counter.make(name, "reduce-scatter", axes, size, backward, hidden=ring)


def _pipeline(counter: _Counter) -> Iterator[Collective]:
    """Yield hidden states to the next stage, and their gradients back."""
    config = counter.config
    parallel = config.parallel
    stages, chunks = counter.grid.sizes["pp"], parallel.virtual_pipeline_model_parallel_size or 1
    cut = sequence_parts(parallel)
    size = counter.tokens * config.model.hidden_size * counter.item / cut
    if stages == 1:
        return
    # A chunk's neighbours are on other stages: the last stage's send to the first.
    forward = chunks - (1 if counter.is_last else 0)
    backward = chunks - (1 if counter.is_first else 0)
    per_stage = counter.grid.world_size // stages
    to, back = (counter.stage + 1) % stages, (counter.stage - 1) % stages
    interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    for name, calls, other in (
        ("hidden states, pipeline", forward, to),
        ("gradients, pipeline", backward, back),
    ):
        # The slowest link, where stages do not begin with a node; nodes repeat the pattern.
        ends = [counter.first_rank, other * per_stage]
        places = range(min(per_stage, counter.gpu.gpus_per_node))
        links = [GroupLink.between([rank + i for rank in ends], counter.gpu) for i in places]
        link = max(links, key=lambda link: link.nodes)
        if calls:
            yield Collective(
                name, "send", ("pp",), size, calls * counter.batches, link, hidden=interleaved
            )


def _data_parallel(counter: _Counter) -> Iterator[Collective]:
    """Yield gradients, and with the distributed optimizer the updated weights."""
    config = counter.config
    parallel = config.parallel
    counts = counts_of_rank(config, counter.stage)
    for name, number, axes in (
        ("dense parts", counts.dense, ("cp", "dp")),
        ("experts", counts.routed, ("edp",)),
    ):
        gradients = f"gradients of {name}"
        size, hidden = number * _FP32, parallel.overlap_grad_reduce
        if not parallel.use_distributed_optimizer:
            yield from counter.make(gradients, "all-reduce", axes, size, 1, hidden=hidden)
            continue
        yield from counter.make(gradients, "reduce-scatter", axes, size, 1, hidden=hidden)
        hidden = parallel.overlap_param_gather
        # Without overlap each of the two optimizers, of dense parameters and of experts, gathers
        # all weights (optimizer/distrib_optimizer.py).
        calls = 2 if counts.routed and not hidden else 1
        size = number * counter.item
        yield from counter.make(
            f"weights of {name}", "all-gather", axes, size, calls, hidden=hidden
        )
    if parallel.sequence_parallel:
        whole = [p.on_rank for p in layer_parts(config) if p.name in ("norms", "router")]
        size = sum(whole) * counter.layers * _FP32
        yield from counter.make("gradients of whole parts", "all-reduce", ("tp",), size, 1)
    if not config.model.untie_embeddings_and_output_weights and (
        counter.is_first != counter.is_last
    ):
        link = GroupLink.between([0, counter.grid.world_size - 1], counter.gpu)
        size = embedding_part(config).on_rank * _FP32
        yield Collective("tied embedding's gradient", "all-reduce", ("pp",), size, 1, link)
