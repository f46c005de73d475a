"""Rules on how model and activations are split over the processes."""

from __future__ import annotations

from collections.abc import Iterator

from megapoly.config import resolve
from megapoly.config.rules.facts import Facts, Rule, have_no_effect, must_be_multiple, must_divide

TP = "`parallel.tensor_model_parallel_size`"
PP = "`parallel.pipeline_model_parallel_size`"
EP = "`parallel.expert_model_parallel_size`"
ETP = "`parallel.expert_tensor_parallel_size`"
CP = "`parallel.context_parallel_size`"
VPP = "`parallel.virtual_pipeline_model_parallel_size`"


def world_fits_layout(facts: Facts) -> Iterator[str]:
    """The job is a whole number of model replicas, and of replicas of the experts."""
    parallel = facts.config.parallel
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    replica = tensor * pipeline * parallel.context_parallel_size
    yield from must_be_multiple(
        "the number of processes", facts.world_size, replica, f"{TP} * {PP} * {CP}"
    )
    expert_tensor = resolve.expert_tensor_parallel_size(parallel)
    experts = expert_tensor * parallel.expert_model_parallel_size * pipeline
    # The engine makes these groups for a dense model, too.
    if experts >= 1 and replica % experts:  # otherwise it follows
        yield from must_be_multiple(
            "the number of processes", facts.world_size, experts, f"{ETP} * {EP} * {PP}"
        )


def experts_divide(facts: Facts) -> Iterator[str]:
    """Every rank holds the same number of experts."""
    experts = facts.config.model.num_moe_experts
    if experts is not None:
        size = facts.config.parallel.expert_model_parallel_size
        yield from must_divide(EP, size, experts, "`model.num_moe_experts`")


def heads_divide(facts: Facts) -> Iterator[str]:
    """Every tensor-parallel rank holds the same number of query and key/value heads."""
    model, size = facts.config.model, facts.config.parallel.tensor_model_parallel_size
    yield from must_divide(TP, size, model.num_attention_heads, "`model.num_attention_heads`")
    if model.num_query_groups not in (None, model.num_attention_heads):
        yield from must_divide(TP, size, model.num_query_groups or 0, "`model.num_query_groups`")


def ffn_widths_divide(facts: Facts) -> Iterator[str]:
    """Every FFN width, after the two thirds of a gated activation, is an integer on every rank."""
    model = facts.config.model
    if facts.activation is None:
        return
    for name, size, ranks, num_ranks in ffn_widths(facts):
        if not resolve.takes_two_thirds(model):
            yield from must_be_multiple(f"`model.{name}`", size, num_ranks, ranks)
            continue
        even = num_ranks % 2 == 0
        yield from must_be_multiple(
            f"with the two thirds that {model.activation} takes, `model.{name}`",
            size,
            num_ranks // 2 * 3 if even else num_ranks * 3,  # 2 / 3 * size = k * num_ranks
            f"{'3/2' if even else '3'} * {ranks}",
        )


def ffn_widths(facts: Facts) -> list[tuple[str, int, str, int]]:
    """Return each FFN width that is set: option, value, the layout option that splits it, ranks."""
    model, parallel = facts.config.model, facts.config.parallel
    tensor = parallel.tensor_model_parallel_size
    if not facts.is_moe:
        return [("ffn_hidden_size", model.ffn_hidden_size, TP, tensor)]
    name = "moe_ffn_hidden_size" if model.moe_ffn_hidden_size else "ffn_hidden_size"
    expert_tensor = resolve.expert_tensor_parallel_size(parallel)
    widths = [(name, resolve.moe_ffn_hidden_size(model), ETP, expert_tensor)]
    shared = model.moe_shared_expert_intermediate_size
    if shared is not None:
        widths.append(("moe_shared_expert_intermediate_size", shared, TP, tensor))
    return widths


def deterministic_rows_divide(facts: Facts) -> Iterator[str]:
    """A row that is summed in a fixed order has equal segments, and ranks hold whole segments."""
    if not facts.config.model.activation_deterministic or facts.activation is None:
        return
    from megapoly.ops.collectives import NUM_SEGMENTS

    for name, size, ranks, num_ranks in ffn_widths(facts):
        width = resolve.ffn_width(facts.config.model, size)
        if num_ranks > 0 and NUM_SEGMENTS % num_ranks:
            yield (
                f"`model.activation_deterministic` needs {ranks} ({num_ranks}) to be 1, 2, 4 or "
                f"{NUM_SEGMENTS}; or set it to false"
            )
        yield from must_be_multiple(
            f"with `model.activation_deterministic`, the width that `model.{name}` gives",
            width,
            NUM_SEGMENTS,
            "the segments of a row",
        )


def layers_divide(facts: Facts) -> Iterator[str]:
    """Every pipeline stage, or chunk of one, holds the same number of layers."""
    parallel = facts.config.parallel
    size, what = parallel.pipeline_model_parallel_size, PP
    if parallel.virtual_pipeline_model_parallel_size is not None:
        size, what = size * parallel.virtual_pipeline_model_parallel_size, f"{PP} * {VPP}"
    yield from must_divide(what, size, facts.config.model.num_layers, "`model.num_layers`")


def interleaving_fits(facts: Facts) -> Iterator[str]:
    """Interleaving needs a pipeline, several chunks, and whole rounds of micro-batches."""
    parallel = facts.config.parallel
    chunks, stages = (
        parallel.virtual_pipeline_model_parallel_size,
        parallel.pipeline_model_parallel_size,
    )
    if chunks is None:
        return
    if stages == 1 or chunks == 1:
        yield (
            f"{VPP} ({chunks}) and {PP} ({stages}) must both be above 1 to interleave; leave the "
            "former null"
        )
    elif facts.data_parallel_size is not None:
        # pipeline_parallel/schedules.py:1007 of Megatron-Core 0.16.1.
        yield from must_be_multiple(
            "for an interleaved pipeline, the micro-batches of a replica",
            resolve.num_microbatches(facts.config, facts.world_size),
            stages,
            PP,
        )


def context_parallel_fits(facts: Facts) -> Iterator[str]:
    """Every rank gets an early and a late part of the sequence, which balances causal attention."""
    parallel, size = facts.config.parallel, facts.config.parallel.context_parallel_size
    if size == 1:
        yield from have_no_effect(facts.config, ["parallel.cp_comm_type"], f"with {CP} ({size})")
        return
    tensor = parallel.tensor_model_parallel_size
    pieces, what = 2 * size, f"2 * {CP}"
    if resolve.uses_sequence_parallel(parallel):
        pieces, what = pieces * tensor, f"{what} * {TP}"
    yield from must_be_multiple(
        "with context parallelism, `training.seq_length`",
        facts.config.training.seq_length,
        pieces,
        what,
    )


def context_parallel_attention_exists(facts: Facts) -> Iterator[str]:
    """Ring attention needs Transformer Engine; exchanging heads needs whole heads on every rank."""
    config, size = facts.config, facts.config.parallel.context_parallel_size
    kind = config.parallel.cp_comm_type
    if size == 1:
        return
    if kind == "p2p" and not facts.uses_transformer_engine:
        yield (
            "`parallel.cp_comm_type` (p2p) is ring attention, which needs Transformer Engine's "
            "attention, and this run does not use it; take all_gather or a2a"
        )
    if kind == "a2a":
        heads = resolve.num_query_groups(config.model)
        name = "num_query_groups" if config.model.num_query_groups else "num_attention_heads"
        yield from must_divide(
            f"with `parallel.cp_comm_type` a2a, {CP} * {TP}",
            size * config.parallel.tensor_model_parallel_size,
            heads,
            f"`model.{name}`",
        )


def sequence_parallel_fits(facts: Facts) -> Iterator[str]:
    """Sequence parallelism splits evenly and needs tensor parallelism; experts need it."""
    parallel, size = facts.config.parallel, facts.config.parallel.tensor_model_parallel_size
    if parallel.sequence_parallel and size == 1:
        yield (
            f"`parallel.sequence_parallel` (True) needs {TP} ({size}) above 1; leave it null, "
            "which follows that size"
        )
    if resolve.uses_sequence_parallel(parallel):
        length = facts.config.training.seq_length
        yield from must_be_multiple(
            "with sequence parallelism, `training.seq_length`", length, size, TP
        )
    elif facts.is_moe and size > 1:
        yield (
            f"`parallel.sequence_parallel` (False) must be on for a mixture of experts with {TP} "
            f"({size}) above 1 (Megatron-Core refuses it in moe_layer.py); leave it null"
        )


def overlap_has_what_it_needs(facts: Facts) -> Iterator[str]:
    """Overlapped gathering of parameters needs sharded state and overlapped reduction."""
    parallel = facts.config.parallel
    needed = {
        "`parallel.use_distributed_optimizer`": parallel.use_distributed_optimizer,
        "`parallel.overlap_grad_reduce`": parallel.overlap_grad_reduce,
    }
    missing = " and ".join(f"{name} (False)" for name, on in needed.items() if not on)
    if parallel.overlap_param_gather and missing:
        yield (
            f"`parallel.overlap_param_gather` (True) needs {missing}; set what it needs "
            "to true, or itself to false"
        )


def recomputation_of_layers_is_complete(facts: Facts) -> Iterator[str]:
    """Full recomputation names layers, in numbers that the engine's loop accepts."""
    parallel, model = facts.config.parallel, facts.config.model
    method, count = parallel.recompute_method, parallel.recompute_num_layers
    if parallel.recompute_granularity != "full":
        return
    if method is None or count is None:
        yield (
            f"`parallel.recompute_granularity` (full) needs `parallel.recompute_method` ({method}) "
            f"and `parallel.recompute_num_layers` ({count}); uniform and 1 recompute every layer"
        )
        return
    chunks = parallel.virtual_pipeline_model_parallel_size
    stages = parallel.pipeline_model_parallel_size * (chunks or 1)
    part = "pipeline stage" if chunks is None else "chunk of a pipeline stage"
    if stages < 1 or model.num_layers < 1 or model.num_layers % stages:
        return
    layers = model.num_layers // stages
    if method == "uniform":
        # transformer_block.py of Megatron-Core 0.16.1 runs past the last layer otherwise.
        yield from must_divide(
            "`parallel.recompute_num_layers`", count, layers, f"the layers of a {part}"
        )
    elif count > layers:
        yield (
            f"`parallel.recompute_num_layers` ({count}) must not exceed the layers of a {part} "
            f"({layers}); {layers} recomputes all"
        )


def recomputation_options_have_effect(facts: Facts) -> Iterator[str]:
    """Each granularity of recomputation has its own options."""
    granularity = facts.config.parallel.recompute_granularity
    for reader, keys in (
        ("full", ["parallel.recompute_method", "parallel.recompute_num_layers"]),
        ("selective", ["parallel.recompute_modules"]),
    ):
        if granularity != reader:
            condition = f"with `parallel.recompute_granularity` ({granularity or 'null'})"
            yield from have_no_effect(facts.config, keys, condition, f", or take {reader}")


def recomputed_modules_exist(facts: Facts) -> Iterator[str]:
    """Selective recomputation names modules that the model's layers have."""
    if facts.config.parallel.recompute_granularity != "selective":
        return
    modules = facts.config.parallel.recompute_modules
    kind, present, absent = (
        ("mixture of experts", "moe", "mlp") if facts.is_moe else ("dense model", "mlp", "moe")
    )
    if absent in modules:
        yield (
            f"`parallel.recompute_modules` ({', '.join(modules)}) has {absent}, which a {kind} "
            f"does not have; take {present}"
        )
    if not modules:
        yield (
            "`parallel.recompute_modules` ([]) is empty, so nothing is recomputed; name a module, "
            "or set `parallel.recompute_granularity` to null"
        )


RULES: tuple[Rule, ...] = (
    world_fits_layout,
    experts_divide,
    heads_divide,
    ffn_widths_divide,
    deterministic_rows_divide,
    layers_divide,
    interleaving_fits,
    context_parallel_fits,
    context_parallel_attention_exists,
    sequence_parallel_fits,
    overlap_has_what_it_needs,
    recomputation_of_layers_is_complete,
    recomputation_options_have_effect,
    recomputed_modules_exist,
)
