"""A plan as tables for the terminal."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from itertools import groupby
from typing import Any

from rich.console import Console, JustifyMethod
from rich.table import Table

from megapoly.config.options import text_of
from megapoly.config.resolve import num_microbatches, tokens_per_step
from megapoly.preflight.planning.memory import HEADROOM
from megapoly.preflight.planning.parameters import active_parameters, model_parts, total_parameters
from megapoly.preflight.planning.plan import Plan
from megapoly.preflight.planning.rank_grid import num_nodes
from megapoly.preflight.planning.search import FittingLayout
from megapoly.training.flops import recomputed_flops_per_token, training_flops_per_token

# Shown when no single change of `remedies` is enough.
NOTHING_ALONE = "No single change makes it fit; --search lists layouts that do."

_AXES = {
    "tp": "tensor",
    "cp": "context",
    "dp": "data",
    "pp": "pipeline",
    "etp": "expert tensor",
    "ep": "expert",
    "edp": "expert data",
}


def show(plan: Plan, console: Console) -> None:
    """Print everything except suggestions and search."""
    nodes = num_nodes(plan.world_size, plan.gpu)
    plural = "s" if nodes > 1 else ""
    lines = f"{plan.config.run_dir}: {plan.world_size} x {plan.gpu.name} on {nodes} node{plural}"
    for part in (
        lines,
        parameter_table(plan),
        layout_table(plan),
        memory_table(plan),
        memory_line(plan),
        message_table(plan),
        "(in parentheses: while the GPU computes)",
        time_table(plan),
        *time_lines(plan),
    ):
        if isinstance(part, Table):
            console.print()
        console.print(part, highlight=False, markup=False)


def parameter_table(plan: Plan) -> Table:
    """Return a table of the model's parameters."""
    config = plan.config
    table = _table("parameters", "of the model:", "")
    for part in model_parts(config):
        table.add_row(part.name, f"{part.total:,}", "each expert its own" if part.routed else "")
    table.add_row("total", f"{total_parameters(config):,}", "", style="bold")
    table.add_row("active", f"{active_parameters(config):,}", "used by one token", style="bold")
    return table


def layout_table(plan: Plan) -> Table:
    """Return a table of the sizes of the layout, and of rank 0's group along each axis."""
    table = _table("parallelism", "size:", "rank 0 with ranks", "through")
    for axis, name in _AXES.items():
        if axis in ("etp", "ep", "edp") and not plan.config.model.num_moe_experts:
            continue
        ranks = plan.grid.group(axis)
        link = plan.group_link(axis)
        where = {"none": "", "node": "the node's own link"}.get(
            link.name, f"the network, {link.nodes} nodes"
        )
        table.add_row(name, str(len(ranks)), _ranks(ranks[1:]), where)
    return table


def _ranks(ranks: list[int]) -> str:
    if len(ranks) <= 4:
        return " ".join(map(str, ranks))
    return f"{ranks[0]} {ranks[1]} .. {ranks[-1]}"


def memory_table(plan: Plan) -> Table:
    """Return a table of the memory of one rank of each kind of pipeline stage."""
    table = _table("memory of a rank", *_stage_names(plan))
    columns = [plan.memory[stages[0]] for stages in _like_stages(plan)]
    for name in ("weights", "gradients", "optimizer", "activations", "temporary"):
        table.add_row(name, *(_gib(getattr(memory, name)) for memory in columns))
    table.add_row("total", *(_gib(memory.total) for memory in columns), style="bold")
    return table


def memory_line(plan: Plan) -> str:
    """Return one sentence on whether the plan fits into the device's memory."""
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    return (
        f"{verdict} in {_gib(plan.usable_memory)} GiB; {HEADROOM:.0%} of {_gib(plan.gpu.memory)} "
        "GiB are left for CUDA, NCCL and the allocator"
    )


def _like_stages(plan: Plan) -> list[list[int]]:
    """Return the pipeline stages in groups with the same memory."""
    stages = range(plan.num_stages)
    return [list(group) for _, group in groupby(stages, key=lambda stage: plan.memory[stage])]


def _stage_names(plan: Plan) -> list[str]:
    if plan.num_stages == 1:
        return ["GiB:"]
    return [
        f"stage {group[0]}, GiB:" if len(group) == 1 else f"{group[0]}-{group[-1]}, GiB:"
        for group in _like_stages(plan)
    ]


def message_table(plan: Plan) -> Table:
    """Return a table of the messages of a rank, of the stage whose messages take longest."""
    stage = max(range(plan.num_stages), key=lambda s: sum(c.time for c in plan.collectives[s]))
    title = "messages of a step"
    if plan.num_stages > 1:
        title += f", stage {stage}"
    table = _table(title, "", "ranks:", "nodes:", "calls:", "GB sent:", "seconds:")
    for message in plan.collectives[stage]:
        time = f"{message.time:.4f}"
        table.add_row(
            message.name,
            message.kind,
            str(message.link.size),
            str(message.link.nodes),
            f"{message.calls:,.0f}",
            f"{message.sent_bytes / 1e9:,.3f}",
            f"({time})" if message.hidden else f"{time} ",
        )
    if not plan.collectives[stage]:
        table.add_row("none")
    return table


def time_table(plan: Plan) -> Table:
    """Return a table of the lower bound on the time of a step."""
    step = plan.step
    table = _table("time of a step, at least", "seconds:", "")
    recomputed = recomputed_flops_per_token(plan.config) / training_flops_per_token(plan.config)
    notes = {
        "products": f"at {_peaks(plan)}"
        + (f"; {recomputed:.0%} more by recomputation" if recomputed else ""),
        "operators": f"at {plan.gpu.memory_bandwidth / 1e9:,.0f} GB/s",
        "messages": "that are waited for",
        "bubble": "of the pipeline",
        "data_parallel": "that one micro-batch cannot hide",
        "optimizer": "",
    }
    for name, note in notes.items():
        if getattr(step, name):
            table.add_row(name.replace("_", " "), f"{getattr(step, name):.4f}", note)
    table.add_row("total", f"{step.total:.4f}", f"for {step.tokens:,} tokens", style="bold")
    return table


def _peaks(plan: Plan) -> str:
    bf16 = f"{plan.gpu.bf16_flops / 1e12:g}"
    unit = "TFLOP/s"
    if not plan.config.training.bf16:
        return f"{bf16} {unit}, the peak of bf16; the peak of fp32 is far lower"
    if plan.config.training.fp8 is None:
        return f"{bf16} {unit}"
    assert plan.gpu.fp8_flops is not None, "the rules refuse FP8 on such a GPU"
    return f"{plan.gpu.fp8_flops / 1e12:g} (FP8) and {bf16} (bf16) {unit}"


def time_lines(plan: Plan) -> list[str]:
    """Return the lines that follow from the bound."""
    config, step = plan.config, plan.step
    batches = num_microbatches(config, plan.world_size)
    per_token = training_flops_per_token(config)
    return [
        f"{per_token / 1e9:.2f} GFLOP a token, {per_token * tokens_per_step(config) / 1e15:.2f} "
        f"PFLOP a step; {batches} micro-batch{'es' if batches > 1 else ''} of "
        f"{config.training.micro_batch_size} x {config.training.seq_length:,} tokens",
        f"at most {step.mfu:.1%} MFU{_of_bf16(plan)}, "
        f"{step.tokens_per_second / plan.world_size:,.0f} tokens/s a GPU; "
        f"at least {plan.days:.2f} days for {plan.train_tokens / 1e9:,.1f}B tokens",
    ]


def _of_bf16(plan: Plan) -> str:
    training = plan.config.training
    return "" if training.bf16 and training.fp8 is None else " (of the bf16 peak)"


def search_table(found: list[FittingLayout], limit: int) -> Table:
    """Return a table of the layouts with the lowest bounds."""
    table = _table(
        f"{min(limit, len(found))} of {len(found)} that fit",
        "micro-batch:",
        "recomputed",
        "GiB:",
        "step, s:",
        "MFU:",
        "days:",
    )
    for item in found[:limit]:
        plan = item.plan
        table.add_row(
            item.layout.name,
            str(plan.config.training.micro_batch_size),
            plan.config.parallel.recompute_granularity or "",
            _gib(plan.needed_memory),
            f"{plan.step.total:.3f}",
            f"{plan.step.mfu:.1%}",
            f"{plan.days:.2f}",
        )
    return table


def arguments(options: dict[str, Any]) -> str:
    """Return options as arguments of a command line."""
    return " ".join(f"--{key} {shlex.quote(text_of(value))}" for key, value in options.items())


def _table(*columns: str) -> Table:
    """Return a table without lines; columns whose names end with a colon hold numbers."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        is_number = column.endswith(":")
        justify: JustifyMethod = "right" if is_number else "left"
        table.add_column(column.rstrip(":"), justify=justify, no_wrap=i > 0)
    return table


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"


def suggestions(found: Iterable[tuple[dict[str, Any], Plan]]) -> list[str]:
    """Return one line for each change that makes a plan fit."""
    return [
        f"{arguments(change)}: {_gib(plan.needed_memory)} GiB, at least {plan.step.total:.3f} s "
        "a step"
        for change, plan in found
    ]
