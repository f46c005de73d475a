"""Downstream accuracy of the paper's full-size models.

Source: PolyCom (ICLR 2025), Tables 1 and 3; percent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class PaperTable:
    """One table of the paper.

    Args:
        number: number of the table.
        models: models that it describes.
        columns: headings.
        rows: accuracy on the tasks by activation, in the order of the columns.
        averages: last column, by activation.
    """

    number: int
    models: str
    columns: tuple[str, ...]
    rows: Mapping[str, tuple[float, ...]]
    averages: Mapping[str, float]


PAPER_TABLES = {
    "table1": PaperTable(
        number=1,
        models="1.3B dense, 250B tokens",
        columns=("ARC-E", "ARC-C", "Hella-\nSwag", "PIQA", "SciQ", "Wino-\nGrande"),
        rows={
            "SwiGLU": (56.61, 27.47, 49.23, 68.61, 86.10, 56.83),
            "GELU": (55.43, 27.73, 48.42, 68.12, 87.40, 54.78),
            "ReLU": (55.68, 28.50, 48.59, 68.39, 87.10, 54.85),
            "PolyReLU": (57.53, 27.99, 50.19, 70.29, 87.60, 55.72),
            "PolyNorm": (59.68, 29.01, 50.86, 69.15, 87.20, 56.20),
        },
        averages={
            "SwiGLU": 57.47,
            "GELU": 56.98,
            "ReLU": 57.18,
            "PolyReLU": 58.22,
            "PolyNorm": 58.68,
        },
    ),
    "table3": PaperTable(
        number=3,
        models="6.9B mixture of experts, 1.3B active, 200B tokens",
        columns=(
            "MMLU",
            "Hella-\nSwag",
            "SciQ",
            "ARC-C",
            "ARC-E",
            "PIQA",
            "Wino-\nGrande",
            "OBQA",
            "COPA",
        ),
        rows={
            "SwiGLU": (37.07, 66.49, 90.60, 37.12, 71.58, 76.61, 62.75, 39.80, 83.00),
            "PolyNorm": (37.27, 67.63, 92.40, 38.46, 70.70, 77.04, 62.19, 40.60, 84.00),
        },
        averages={"SwiGLU": 62.78, "PolyNorm": 63.37},
    ),
}
