"""The result of a dry run as a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from megapoly.platform.gpus import GPU
from megapoly.preflight.planning.dry_run import DryRun, RankClass

_GIB = 2**30
_COLUMNS = 4  # distinct ranks side by side, in a terminal of 80
_LAST_COUNT = "expert parameters"
_ROWS: tuple[tuple[str, Callable[[RankClass], str]], ...] = (
    ("ranks", lambda c: f"{c.num_ranks:,}"),
    ("first of them", lambda c: f"{c.first_rank:,}"),
    ("pipeline stage", lambda c: f"{c.coordinates.pp}"),
    ("dense parameters", lambda c: f"{c.dense_parameters:,}"),
    ("expert parameters", lambda c: f"{c.expert_parameters:,}"),
    ("weights", lambda c: _gib(c.weight_bytes)),
    ("gradients", lambda c: _gib(c.gradient_bytes)),
    ("optimizer state", lambda c: _gib(c.optimizer_bytes)),
    ("activations kept", lambda c: _gib(c.activation_bytes)),
    ("while a pass runs", lambda c: _gib(c.passing_bytes)),
    ("together", lambda c: _gib(c.total_bytes)),
)


def show(found: DryRun, gpu: GPU, console: Console) -> None:
    """Print the distinct ranks, the checks and the time.

    Args:
        found: the dry run.
        gpu: GPU that the job is meant for.
        console: where to print.
    """
    title = f"{found.world_size:,} x {gpu.name}: distinct ranks, memory in GiB"
    console.print(title, highlight=False, markup=False, soft_wrap=True)
    for i in range(0, len(found.classes), _COLUMNS):
        console.print(_table(found.classes[i : i + _COLUMNS]))
    for text in _lines(found, gpu):
        console.print(text, highlight=False, markup=False, soft_wrap=True)


def _table(classes: Sequence[RankClass]) -> Table:
    table = Table(box=SIMPLE_HEAD, show_header=False)
    table.add_column("", no_wrap=True)
    for _ in classes:
        table.add_column("", justify="right", no_wrap=True)
    for name, cell in _ROWS:
        table.add_row(name, *(cell(each) for each in classes), end_section=name == _LAST_COUNT)
    return table


def _gib(size: int | None) -> str:
    return "-" if size is None else f"{size / _GIB:.3f}"


def _lines(found: DryRun, gpu: GPU) -> list[str]:
    largest = max(each.total_bytes for each in found.classes)
    lines = [
        f"parameters: {found.total_parameters:,}, of which {found.active_parameters:,} active; the "
        f"ranks hold {found.counted_parameters:,}, each counted once",
        f"memory of the largest rank: {largest / _GIB:.1f} of {gpu.memory / _GIB:.0f} GiB, without "
        "fragments of the allocator and buffers of communication",
    ]
    if found.activations_missing:
        lines.append(f"activations were not built: {found.activations_missing}")
    elif found.config.model.num_moe_experts:
        lines.append("activations are for tokens that are distributed evenly over the experts")
    lines.append(
        f"built {found.num_built} of {found.world_size:,} ranks, which represent all, in "
        f"{found.seconds:.1f} s"
    )
    if not found.problems:
        return [*lines, "all adds up: weights, gradient buffers, optimizer shards"]
    wrong = [f"  {i}. {problem}" for i, problem in enumerate(found.problems, start=1)]
    return [*lines, f"{len(wrong)} do not add up:", *wrong]
