"""What a run costs: model FLOPs and wall time."""

from __future__ import annotations

from dataclasses import fields

from megapoly.config import Config
from megapoly.config.schema import ModelConfig
from megapoly.study.report.runs import Run
from megapoly.training.flops import training_flops_per_token


def training_flops(run: Run) -> float:
    """Return the model FLOPs of a run's tokens, as ``megapoly.training.flops`` counts them.

    These are matrix products. Elementwise operations, those of the activation among them, are not
    counted: wall time has them.
    """
    recorded = run.config["model"]
    config = Config()
    config.model = ModelConfig(
        **{each.name: recorded[each.name] for each in fields(ModelConfig) if each.name in recorded}
    )
    config.training.seq_length = int(run.config["training"]["seq_length"])
    return float(training_flops_per_token(config)) * run.tokens


def times_compare(run: Run, other: Run) -> bool:
    """Return whether two runs are of one comparison, which runs on one kind of machine."""
    return (
        run.comparison is not None
        and run.comparison == other.comparison
        and run.wall_time_of == other.wall_time_of
        and other.wall_time_s > 0
    )
