"""Report of ``operators.py``: figures, goals and tables of the measurements."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from megapoly.benchmarks.activation_forms import DTYPES, Candidate, Case
from megapoly.benchmarks.round_statistics import RoundStatistics, digits

PASSES = ("forward", "backward", "both")
YARDSTICKS = ("eager", "liger")
# copy_ reads an element and writes one.
COPY_TENSORS = 2
# Twice the rounding of the dtype, for results of that dtype. Gradients of coefficients and
# probabilities are long fp32 sums in which terms cancel.
ERROR_LIMITS = {"bf16": 2**-6, "fp16": 2**-9, "fp32": 1e-5}
SUM_ERROR_LIMIT = 1e-2
SUMS = ("grad_coefficients", "grad_probs")


@dataclass(frozen=True)
class Goal:
    """Goal of the project for PolyNorm (order 3, bf16, dense) on one kind of machine.

    Args:
        device: part of type and name of the device.
        pass_name: of ``PASSES``.
        ratio: field of that pass.
        least: ratio to reach.
        shapes: rows and width; None for all.
    """

    device: str
    pass_name: str
    ratio: str
    least: float
    shapes: tuple[tuple[int, int], ...] | None = None

    def applies(self, case: Case, device: str) -> bool:
        """Return whether the goal is for this machine and case."""
        shape = (case.rows, case.width)
        return (
            self.device in device
            and case == Case("polynorm", 3, *shape, "bf16")
            and (self.shapes is None or shape in self.shapes)
        )


GOALS = [
    Goal("cpu", "both", "over_eager", 8.0, ((2048, 1536), (2048, 8256))),
    Goal("H100", "forward", "of_copy", 0.85),
    Goal("H100", "backward", "of_copy", 0.85),
    Goal("H100", "both", "over_liger", 2.0),
]


@dataclass
class Seconds:
    """Seconds of one candidate by round."""

    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)

    def of(self, pass_name: str) -> list[float]:
        """Return the seconds of ``forward``, ``backward``, or both in the same round."""
        if pass_name == "both":
            return [f + b for f, b in zip(self.forward, self.backward, strict=True)]
        return self.forward if pass_name == "forward" else self.backward


def case_report(
    case: Case,
    candidates: Sequence[Candidate],
    facts: Sequence[Mapping[str, Any]],
    times: Sequence[Seconds],
    copy: Sequence[float],
    device: str,
) -> dict[str, Any]:
    """Return all figures of a case.

    Args:
        case: that was measured.
        candidates: that were measured.
        facts: ``errors`` and ``saved_bytes`` of each candidate.
        times: seconds of each candidate.
        copy: seconds of ``copy_`` by round.
        device: type and name, for the goals.
    """
    num_elements = case.rows * case.width
    tensor_bytes = num_elements * DTYPES[case.dtype].itemsize
    yardsticks = {c.name: s for c, s in zip(candidates, times, strict=True) if c.name in YARDSTICKS}
    entries = []
    for candidate, fact, seconds in zip(candidates, facts, times, strict=True):
        passes = {
            name: _pass_report(name, candidate, seconds, copy, yardsticks, tensor_bytes)
            for name in PASSES
        }
        saved = {"saved_bytes_per_element": fact["saved_bytes"] / num_elements}
        wrong = {"wrong": wrong_results(case.dtype, fact["errors"])}
        entries.append({"name": candidate.name, **passes, **fact, **saved, **wrong})
    return {
        "title": str(case),
        **asdict(case),
        "copy": _rate(copy, COPY_TENSORS * tensor_bytes),
        "candidates": entries,
        "goals": goals_of(case, entries, device),
    }


def _pass_report(
    name: str,
    candidate: Candidate,
    seconds: Seconds,
    copy: Sequence[float],
    yardsticks: Mapping[str, Seconds],
    tensor_bytes: int,
) -> dict[str, Any]:
    own = seconds.of(name)
    forward, backward = candidate.num_tensors
    num_tensors = {"forward": forward, "backward": backward, "both": forward + backward}[name]
    copy_of_as_much = [second * num_tensors / COPY_TENSORS for second in copy]
    return {
        **_rate(own, num_tensors * tensor_bytes),
        "ms_by_round": [1e3 * second for second in own],
        "of_copy": _ratio(copy_of_as_much, own),
        **{f"over_{other}": _ratio(s.of(name), own) for other, s in yardsticks.items()},
    }


def _rate(seconds: Sequence[float], num_bytes: int) -> dict[str, Any]:
    spread = RoundStatistics.of(seconds)
    ms = {name: 1e3 * value for name, value in asdict(spread).items()}
    return {"ms": ms, "gb_per_s": num_bytes / spread.median / 1e9}


def _ratio(slow: Sequence[float], fast: Sequence[float]) -> dict[str, float]:
    """Return how many times faster ``fast`` is, by round."""
    return asdict(RoundStatistics.of([s / f for s, f in zip(slow, fast, strict=True)]))


def wrong_results(dtype: str, errors: Mapping[str, float]) -> list[str]:
    """Return the names of results that are NaN or differ from float64 by more than rounding."""
    limits = {name: SUM_ERROR_LIMIT if name in SUMS else ERROR_LIMITS[dtype] for name in errors}
    return [name for name, error in errors.items() if not error <= limits[name]]


def goals_of(case: Case, entries: Sequence[Mapping[str, Any]], device: str) -> list[dict[str, Any]]:
    """Return the goals that apply, the measurements of megapoly's operators, and the outcomes."""
    return [
        {
            "candidate": entry["name"],
            "pass": goal.pass_name,
            "ratio": goal.ratio,
            "goal": goal.least,
            "measured": (measured := entry[goal.pass_name][goal.ratio]["median"]),
            "reached": measured >= goal.least and not entry["wrong"],
        }
        for goal in GOALS
        for entry in entries
        if entry["name"].startswith("megapoly")
        and goal.applies(case, device)
        and goal.ratio in entry[goal.pass_name]
    ]


def print_report(report: Mapping[str, Any]) -> None:
    """Print a table for each case, the goals and the machine."""
    console = Console() if sys.stdout.isatty() else Console(width=120)
    versions = ", ".join(
        f"{name} {report[name]}" for name in ("torch", "triton", "liger-kernel") if report[name]
    )
    threads = f", {report['threads']} threads" if report["device"] == "cpu" else ""
    for case in report["cases"]:
        console.print(_table(case))
        for name, reason in case["missing"].items():
            console.print(f"{name} not measured: {reason}")
        for entry in case["candidates"]:
            for name in entry["wrong"]:
                error = entry["errors"][name]
                console.print(f"{entry['name']} is WRONG: {name} differs by {error:.1e}")
        for goal in case["goals"]:
            console.print(_goal_line(goal))
        console.print()
    console.print(
        f"{report['device_name']}{threads}, {versions}; median of {report['rounds']} rounds, cold "
        "caches: the L2 or last-level cache is overwritten before each timed pass"
    )


def _table(case: Mapping[str, Any]) -> Table:
    table = Table(title=case["title"], title_justify="left")
    table.add_column("")
    table.add_column("pass")
    for column in ("ms", "lowest to highest", "GB/s", "of copy", "x eager", "saved", "error"):
        table.add_column(column, justify="right")
    for entry in case["candidates"]:
        notes = {
            "forward": (_saved_cell(entry), entry["errors"]["output"]),
            "backward": ("", entry["errors"]["grad_x"]),
        }
        for name in PASSES:
            saved, error = notes.get(name, ("", None))
            table.add_row(
                entry["name"] if name == PASSES[0] else "",
                name,
                *_rate_cells(entry[name]),
                f"{entry[name]['of_copy']['median']:.2f}",
                f"{entry[name]['over_eager']['median']:.2f}" if "over_eager" in entry[name] else "",
                saved,
                "" if error is None else f"{error:.0e}",
            )
        table.add_section()
    table.add_row("copy_", "", *_rate_cells(case["copy"]), "1.00")
    return table


def _saved_cell(entry: Mapping[str, Any]) -> str:
    return f"{entry['saved_bytes_per_element']:.2f} ({entry['saved_bytes'] / 1e6:.1f} MB)"


def _rate_cells(rate: Mapping[str, Any]) -> list[str]:
    ms = rate["ms"]
    spread = f"{digits(ms['min'])} to {digits(ms['max'])}"
    return [digits(ms["median"]), spread, digits(rate["gb_per_s"])]


def _goal_line(goal: Mapping[str, Any]) -> str:
    meaning = {
        "of_copy": "of copy_'s GB/s",
        "over_eager": "x eager",
        "over_liger": "x liger",
    }
    passes = "forward and backward" if goal["pass"] == "both" else goal["pass"]
    return (
        f"goal of {goal['candidate']}: {passes} at least {goal['goal']} {meaning[goal['ratio']]}: "
        f"{goal['measured']:.2f}, {'reached' if goal['reached'] else 'missed'}"
    )
