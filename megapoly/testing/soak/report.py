"""What a soak has found: a table of kinds of faults, and the faults that were not survived."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from megapoly.testing.soak.kinds import KINDS
from megapoly.testing.soak.loop import Outcome

_COMPLETE = "a complete run equals the uninterrupted one"


@dataclass
class Report:
    """Outcomes, as they come.

    Args:
        outcomes: of all faults and comparisons so far.
    """

    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def num_faults(self) -> int:
        """Number of faults so far."""
        return sum(outcome.kind is not None for outcome in self.outcomes)

    @property
    def lost(self) -> list[Outcome]:
        """What was not survived."""
        return [outcome for outcome in self.outcomes if outcome.problem is not None]

    def table(self) -> Table:
        """Return a row for each kind: tried, survived, lost, and seconds of one."""
        table = Table("fault")
        for title in ("tried", "survived", "lost", "seconds"):
            table.add_column(title, justify="right")
        names = [name for name in KINDS if self._of(name)]
        rows = [(KINDS[name].summary, self._of(name)) for name in names]
        rows.append(("every fault", [each for name in names for each in self._of(name)]))
        rows.append((_COMPLETE, self._of(None)))
        for number, (summary, outcomes) in enumerate(rows, start=1):
            lost = sum(outcome.problem is not None for outcome in outcomes)
            tried = len(outcomes)
            seconds = sum(outcome.seconds for outcome in outcomes) / max(tried, 1)
            counts = map(str, (tried, tried - lost, lost))
            is_last_kind = number == len(rows) - 2
            table.add_row(summary, *counts, f"{seconds:.1f}", end_section=is_last_kind)
        return table

    def findings(self) -> list[str]:
        """Return a line for each fault that was not survived."""
        return [
            f"lost: {_summary(outcome)}, {outcome.run}: {outcome.problem} (see {outcome.log})"
            for outcome in self.lost
        ]

    def write_json(self, file: Path, description: dict[str, Any]) -> None:
        """Write every outcome.

        Args:
            file: to write.
            description: of the soak, added to the file.
        """
        outcomes = [
            {
                "kind": outcome.kind,
                "run": outcome.run,
                "seconds": outcome.seconds,
                "problem": outcome.problem,
            }
            for outcome in self.outcomes
        ]
        file.write_text(json.dumps(description | {"outcomes": outcomes}, indent=1) + "\n")

    def _of(self, name: str | None) -> Sequence[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.kind == name]


def _summary(outcome: Outcome) -> str:
    return _COMPLETE if outcome.kind is None else KINDS[outcome.kind].summary
