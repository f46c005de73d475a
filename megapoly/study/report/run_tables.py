"""Tables of how the runs of a group were trained: learning rates, and their differences."""

from __future__ import annotations

from megapoly.activations import registry
from megapoly.study.report.cells import NONE, Cell, Table, duration, listed
from megapoly.study.report.costs import training_flops
from megapoly.study.report.groups import Entry, RunGroup, mean_final_loss, options_of
from megapoly.study.report.runs import Run


def learning_rates(group: RunGroup) -> Table:
    """Return the table of final losses of each activation at each rate."""
    rates = sorted({lr for entry in group.entries for lr in entry.tried})
    rows = [(entry.label, [_at_rate(entry, lr) for lr in rates]) for entry in group.entries]
    notes = [
        f"Final {group.ranked_by} loss, mean over the seeds that all rates of the line have; below "
        "it over all seeds of the rate, if it has more. Bold: the rate that other tables and "
        "figures use, the best one among those with the most seeds. It is chosen by this same "
        "loss, which favours every line slightly."
        if len(rates) > 1
        else f"Final {group.ranked_by} loss."
    ]
    return Table(
        "Learning rates",
        ["activation", *(f"{lr:g}" for lr in rates)],
        rows,
        notes + warnings(group),
    )


def _at_rate(entry: Entry, lr: float) -> Cell:
    if lr not in entry.tried:
        return Cell(NONE)
    runs, score = entry.rates.get(lr, {}), entry.scores[lr]
    cell = Cell("diverged" if score is None else f"{score:.3f}", best=lr == entry.lr)
    if lost := entry.diverged.get(lr):
        cell.below = f"{len(lost)} of {len(lost) + len(runs)} seeds"
        return cell
    cell.below = f"{len(runs)} seeds" if len(runs) > 1 else "1 seed"
    if len(runs) > min(map(len, entry.rates.values())):
        mean = mean_final_loss(runs.values())
        cell.below += "" if mean is None else f": {mean:.3f}"
    return cell


def warnings(group: RunGroup) -> list[str]:
    """Return warnings about the choice of the rates."""
    found = []
    for entry in group.entries:
        rates = entry.tried
        if lost := entry.diverged.get(entry.lr):
            found.append(
                f"{entry.label} diverged with seed {' and '.join(lost)} at the rate that is shown; "
                "its means leave that seed out."
            )
        scored = {lr: score for lr, score in entry.scores.items() if score is not None}
        if len(rates) < 2 or not scored:
            continue
        best = min(scored, key=lambda lr: scored[lr])
        if len(entry.rates[best]) == len(entry.seeds) and not lost:
            best = entry.lr
        if best in (rates[0], rates[-1]):
            side = "lowest" if best == rates[0] else "highest"
            found.append(
                f"{entry.label} is best at the {side} rate that was tried ({best:g}); a rate "
                "beyond it may be better."
            )
        if best != entry.lr:
            found.append(
                f"{entry.label} is shown at {entry.lr:g}, which has the most seeds, although "
                f"{best:g} is better on the seeds that both have."
            )
    return [*found, *untuned(group)]


def untuned(group: RunGroup) -> list[str]:
    """Name the lines that had one learning rate, or fewer to choose from than others."""
    most = max(len(entry.tried) for entry in group.entries)
    if most == 1:
        rates = sorted({entry.lr for entry in group.entries})
        return [
            f"Not tuned: every line was trained at one rate ({listed(list(map(_rate, rates)))}), "
            "which favours the line that it suits best."
        ]
    single = [entry for entry in group.entries if len(entry.tried) == 1]
    fewer = [entry for entry in group.entries if 1 < len(entry.tried) < most]
    found = []
    if single:
        rate = listed([_rate(lr) for lr in sorted({entry.lr for entry in single})])
        found.append(
            f"Not tuned: trained at one rate ({rate}), where other lines had {most} to choose "
            f"from: {listed([entry.label for entry in single])}."
        )
    if fewer:
        labels = listed([f"{entry.label} ({len(entry.tried)})" for entry in fewer])
        found.append(f"Trained at fewer rates than the {most} of other lines: {labels}.")
    if not found and len({tuple(entry.tried) for entry in group.entries}) > 1:
        found.append("The lines were not all trained at the same rates.")
    return found


def _rate(rate: float) -> str:
    return f"{rate:g}"


def own_options(group: RunGroup) -> Table:
    """Return the table of what differs between the runs of a group."""
    rows = []
    for entry in group.entries:
        activation = registry.get(entry.activation)
        run, runs = entry.runs[0], list(entry.seeds.values())
        speed = sum(r.tokens for r in runs) / max(1e-9, sum(r.wall_time_s for r in runs))
        cells = [
            Cell(f"{run.parameters:,}", below=f"{run.active_parameters:,} active" * group.moe),
            Cell("gated, two thirds as wide" if activation.gated else "ungated"),
            Cell(f"{entry.lr:g}"),
            Cell(", ".join(entry.seeds)),
            Cell(f"{training_flops(run):.4g}"),
            Cell(
                duration(sum(r.wall_time_s for r in entry.runs)),
                below=f"{len(entry.runs)} run{'s' * (len(entry.runs) > 1)}",
            ),
            Cell(f"{speed:,.0f}"),
        ]
        cells += [Cell(_option(run, name)) for name in group.varied]
        rows.append((entry.label, cells))
    columns = ["activation", "parameters", "FFN", "rate", "seeds", "FLOPs", "wall time", "tokens/s"]
    names = [name.split(".")[-1] for name in group.varied]
    notes = [
        "FLOPs: model FLOPs of one run, of matrix products alone: not those of the activation. "
        "Wall time: all runs of a line in total. Tokens/s: the runs at its rate, including start, "
        "evaluation and checkpoints, on a machine that also did other work; this does not measure "
        "the speed of an activation."
    ]
    return Table("What differs between the runs", [*columns, *names], rows, notes)


def _option(run: Run, name: str) -> str:
    value = options_of(run).get(name, NONE)
    return f"{value:g}" if isinstance(value, float) else str(value)
