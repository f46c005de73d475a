"""The result of a check as a table and as JSON."""

from __future__ import annotations

import dataclasses
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.table import Table

from megapoly.config import Config
from megapoly.config.parsing import to_dict
from megapoly.preflight.layouts import Layout
from megapoly.preflight.parallel_check.comparison import Differences, Tolerance


@dataclasses.dataclass
class Row:
    """One layout.

    Args:
        layout: the layout that was trained.
        seconds: time of the whole job.
        comparison: with one process; None if the job failed.
        failure: why the job failed.
    """

    layout: Layout
    seconds: float
    comparison: Differences | None = None
    failure: str | None = None

    def is_right(self, tolerance: Tolerance) -> bool:
        """Return whether the layout trains the same model as one process."""
        return self.comparison is not None and self.comparison.is_within(tolerance)


@dataclasses.dataclass
class Report:
    """All layouts of a check.

    Args:
        config: the configuration of one process.
        tolerance: for every layout.
        rows: layouts in the order of the check.
        left_out: sentences on options that the check does not cover.
    """

    config: Config
    tolerance: Tolerance
    rows: list[Row]
    left_out: list[str] = dataclasses.field(default_factory=list)

    @property
    def is_right(self) -> bool:
        """Whether all layouts train the same model as one process."""
        return all(row.is_right(self.tolerance) for row in self.rows)

    def table(self) -> Table:
        """Return a table of each layout's largest relative differences from one process."""
        table = Table(box=None, pad_edge=False)
        table.add_column("layout", no_wrap=True)
        for name in ("processes", "loss", "grad norm", "gradients"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in self.rows:
            table.add_row(*_cells(row, self.tolerance))
        return table

    def findings(self) -> list[str]:
        """Return a sentence on each option left out and each layout that differs, then on all."""
        wrong = [row for row in self.rows if not row.is_right(self.tolerance)]
        limits = (
            f"loss {self.tolerance.loss:.0e}, gradient norm {self.tolerance.grad_norm:.0e}, "
            f"gradients {self.tolerance.gradient:.0e}"
        )
        count = len(self.rows)
        verdict = (
            f"{len(wrong)} of {count} layouts differ from one process, beyond"
            if wrong
            else f"All {count} layouts train the model of one process, within"
            if count > 1
            else "The layout trains the model of one process, within"
        )
        return [
            *self.left_out,
            *(_finding(row, self.tolerance) for row in wrong),
            f"{verdict} {limits}",
        ]

    def write_json(self, path: Path) -> None:
        """Write configuration, versions, and every parameter of every layout."""
        packages = {name: version(name) for name in ("megapoly", "megatron-core", "torch")}
        content = {
            "is_right": self.is_right,
            "tolerance": dataclasses.asdict(self.tolerance),
            "left_out": self.left_out,
            "versions": packages,
            "layouts": [_json(row, self.tolerance) for row in self.rows],
            "config": to_dict(self.config),
        }
        path.write_text(json.dumps(content, indent=2) + "\n")


def _cells(row: Row, tolerance: Tolerance) -> list[str]:
    layout = [row.layout.name, str(row.layout.world_size)]
    found = row.comparison
    if found is None:
        return [*layout, "[red]failed[/]"]
    values = (
        (found.loss, tolerance.loss),
        (found.grad_norm, tolerance.grad_norm),
        (found.worst_gradient, tolerance.gradient),
    )
    # `not <=`: NaN is beyond as well.
    return layout + [f"[red]{v:.1e}[/]" if not v <= limit else f"{v:.1e}" for v, limit in values]


def _finding(row: Row, tolerance: Tolerance) -> str:
    if row.comparison is None:
        assert row.failure is not None
        return f"{row.layout.name}: {row.failure.strip().splitlines()[-1]}"
    found = row.comparison
    first = found.first_beyond(tolerance)
    if first is not None:
        what = f"the first parameter whose gradient differs is {first}, by "
        what += f"{found.gradients[first]:.1e}"
    elif found.disagreements:
        what = "every gradient is right on some rank"
    else:
        what = "every gradient is right, the loss or the gradient norm is not"
    for name, difference in found.disagreements.items():
        what += f"; ranks that share {name} differ by {difference:.1e}"
    return f"{row.layout.name}: {what}"


def _json(row: Row, tolerance: Tolerance) -> dict[str, Any]:
    result: dict[str, Any] = {
        "name": row.layout.name,
        "world_size": row.layout.world_size,
        "sizes": dataclasses.asdict(row.layout),
        "seconds": round(row.seconds, 1),
        "is_right": row.is_right(tolerance),
    }
    if row.comparison is None:
        return result | {"failure": row.failure}
    return result | {
        "first_parameter": row.comparison.first_beyond(tolerance),
        **dataclasses.asdict(row.comparison),
    }
