"""Perplexity of a checkpoint on named validation sets, one for each domain.

The computation is that of ``val/NAME`` in training (:mod:`megapoly.training.evaluation`), so that
numbers are the same at every layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from megapoly.config.data_sources import MEAN, validation_sets
from megapoly.evaluation.loaded_checkpoint import LoadedCheckpoint

if TYPE_CHECKING:
    from megapoly.training.evaluation import Evaluation


def report_perplexity(opened: LoadedCheckpoint) -> dict[str, Any]:
    """Evaluate the validation sets; rank 0 prints the table; collective.

    Args:
        opened: with its validation sets.

    Returns:
        As of :func:`perplexity_record`.
    """
    from megapoly.training.distributed import is_rank_zero
    from megapoly.training.evaluation import evaluate_validation_sets

    results = evaluate_validation_sets(opened.model, opened.validation)
    record = perplexity_record(opened, results)
    if is_rank_zero():
        console = Console(highlight=False)
        lines = [_headline(opened), *(f"note: {warning}" for warning in opened.warnings)]
        for line in lines:
            console.print(line, markup=False, soft_wrap=True)
        console.print(perplexity_table(results))
    return record


def perplexity_table(results: Mapping[str, Evaluation]) -> Table:
    """One row for each domain, and the mean of several.

    Args:
        results: by name, of :func:`megapoly.training.evaluation.evaluate_validation_sets`.
    """
    table = Table()
    table.add_column("domain")
    for column in ("loss", "ppl", "tokens"):
        table.add_column(column, justify="right")
    for name, result in results.items():
        if name == MEAN:
            table.add_section()
        table.add_row(name, f"{result.loss:.4f}", f"{result.ppl:.3f}", f"{result.num_tokens:,}")
    return table


def perplexity_record(
    opened: LoadedCheckpoint, results: Mapping[str, Evaluation]
) -> dict[str, Any]:
    """What the table shows and was made from, as plain values.

    Returns:
        ``checkpoint``, ``iteration``, ``seq_length``, ``eval_iters``, and under ``domains`` by name
        ``loss`` (nats), ``ppl``, ``num_tokens`` and, where it was given, ``weight``; ``mean`` has
        the same, and stands there when there are several domains.
    """
    training = opened.model.config.training
    rows: dict[str, dict[str, Any]] = {
        name: {"loss": result.loss, "ppl": result.ppl, "num_tokens": result.num_tokens}
        for name, result in results.items()
    }
    for name, each in validation_sets(opened.model.config.data).items():
        if each.weight is not None:
            rows[name]["weight"] = each.weight
    mean = {MEAN: rows.pop(MEAN)} if MEAN in rows else {}
    return {
        "checkpoint": str(opened.path),
        "iteration": opened.iteration,
        "seq_length": training.seq_length,
        "eval_iters": training.eval_iters,
        "domains": rows,
    } | mean


def _headline(opened: LoadedCheckpoint) -> str:
    training = opened.model.config.training
    part = "whole sets"
    if training.eval_iters is not None:
        part = f"at most {training.eval_iters * training.global_batch_size:,} samples a set"
    return f"{opened.path}: samples of {training.seq_length:,} tokens, {part}"
