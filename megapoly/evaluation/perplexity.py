"""Perplexity of a checkpoint on named validation sets, one for each domain.

The computation is the same as of ``val/NAME`` in training (:mod:`megapoly.training.evaluation`),
so results are the same at every layout.
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


def report_perplexity(loaded: LoadedCheckpoint) -> dict[str, Any]:
    """Evaluate the validation sets, print a table on rank 0; collective.

    Args:
        loaded: the checkpoint, with its validation sets.

    Returns:
        See :func:`perplexity_record`.
    """
    from megapoly.training.distributed import is_rank_zero
    from megapoly.training.evaluation import evaluate_validation_sets

    results = evaluate_validation_sets(loaded.model, loaded.validation)
    record = perplexity_record(loaded, results)
    if is_rank_zero():
        console = Console(highlight=False)
        lines = [_headline(loaded), *(f"note: {warning}" for warning in loaded.warnings)]
        for line in lines:
            console.print(line, markup=False, soft_wrap=True)
        console.print(perplexity_table(results))
    return record


def perplexity_table(results: Mapping[str, Evaluation]) -> Table:
    """Return a table with one row for each domain, and their mean if there are several.

    Args:
        results: by name, from :func:`megapoly.training.evaluation.evaluate_validation_sets`.
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
    loaded: LoadedCheckpoint, results: Mapping[str, Evaluation]
) -> dict[str, Any]:
    """Return the content of the table and its origin as plain values.

    Returns:
        ``checkpoint``, ``iteration``, ``seq_length``, ``eval_iters``, and under ``domains`` by name
        ``loss`` (nats), ``ppl``, ``num_tokens`` and, if it was given, ``weight``. ``mean`` has the
        same fields and exists if there are several domains.
    """
    training = loaded.model.config.training
    rows: dict[str, dict[str, Any]] = {
        name: {"loss": result.loss, "ppl": result.ppl, "num_tokens": result.num_tokens}
        for name, result in results.items()
    }
    for name, each in validation_sets(loaded.model.config.data).items():
        if each.weight is not None:
            rows[name]["weight"] = each.weight
    mean = {MEAN: rows.pop(MEAN)} if MEAN in rows else {}
    return {
        "checkpoint": str(loaded.path),
        "iteration": loaded.iteration,
        "seq_length": training.seq_length,
        "eval_iters": training.eval_iters,
        "domains": rows,
    } | mean


def _headline(loaded: LoadedCheckpoint) -> str:
    training = loaded.model.config.training
    part = "whole sets"
    if training.eval_iters is not None:
        part = f"at most {training.eval_iters * training.global_batch_size:,} samples a set"
    return f"{loaded.path}: samples of {training.seq_length:,} tokens, {part}"
