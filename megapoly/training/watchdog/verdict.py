"""Which rank is behind, from the reports of all watchers of a job."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from megapoly.training.watchdog.evidence import DATA_WORKER, STOPPED, Report

_SHOWN = 8  # ranks that a sentence names


@dataclass(frozen=True)
class Verdict:
    """The conclusion of a hang.

    Args:
        ranks: that are behind; empty: the reports do not tell.
        sentence: names them, and says where they are.
    """

    ranks: list[int]
    sentence: str


def conclude(reports: Mapping[int, Report], world_size: int) -> Verdict:
    """Return which ranks are behind.

    The first of these that applies, from what is certain to what is likely: stopped processes and
    stopped data workers; ranks whose watcher reports nothing; ranks that have not begun a
    collective that others of its group have, and do not wait themselves; ranks that wait for
    nobody while others wait; ranks in the earliest step; ranks that have not begun a collective
    although they wait, as when ranks call different ones.

    Args:
        reports: by rank.
        world_size: ranks of the job.
    """
    ranks = sorted(reports)
    stopped = [
        rank for rank in ranks if reports[rank].is_stopped or _stopped_workers(reports[rank])
    ]
    if stopped:
        return _verdict(stopped, reports, world_size)
    if missing := sorted(set(range(world_size)) - set(ranks)):
        return Verdict(missing, _missing(missing, reports))
    late = late_ranks(reports.values())
    at_work = [rank for rank in ranks if not reports[rank].waits]
    first = min(reports[rank].step for rank in ranks)
    earliest = [rank for rank in ranks if reports[rank].step == first]
    for found in ([rank for rank in late if rank in at_work], at_work, earliest, late):
        if found and (len(found) < len(ranks) or world_size == 1):
            return _verdict(found, reports, world_size)
    return Verdict([], f"hang: {_everywhere(reports)}")


def late_ranks(reports: Iterable[Report]) -> list[int]:
    """Return the ranks that have not begun a collective that another rank of its group has."""
    reached: dict[str, dict[int, int]] = {}
    for report in reports:
        for key, group in (report.groups or {}).items():
            reached.setdefault(_identity(key, group.members), {})[report.rank] = group.reached
    late: set[int] = set()
    for by_rank in reached.values():
        late.update(rank for rank, number in by_rank.items() if number < max(by_rank.values()))
    return sorted(late)


def _identity(key: str, members: Sequence[int]) -> str:
    """Return what distinguishes groups: ranks number those that they are not in differently."""
    return f"{key} {sorted(members)}"


def _stopped_workers(report: Report) -> list[str]:
    return [
        f"its {'data worker' if each.name == DATA_WORKER else f'process {each.name}'} {each.pid}"
        for each in report.workers
        if each.state.upper() == STOPPED
    ]


def _verdict(ranks: Sequence[int], reports: Mapping[int, Report], world_size: int) -> Verdict:
    found = reports[ranks[0]]
    phase = f"step {found.step}" if found.phase == "step" else found.phase
    if found.phase != "step" and found.step:
        phase += f" after step {found.step}"
    what = f"{_doing(found)}silent for {found.silent_s:.0f} s in {phase}"
    if found.place and not found.is_stopped:
        what += f", at {found.place}"
    behind = f"{_named(ranks)} (pid {found.pid} on {found.host})"
    if len(ranks) > 1:
        behind = f"{_named(ranks)} (of rank {found.rank}: pid {found.pid} on {found.host})"
    if world_size == 1:
        return Verdict(
            list(ranks), f"hang: the process (pid {found.pid} on {found.host}) is {what}"
        )
    others = [rank for rank in sorted(reports) if rank not in ranks and reports[rank].waits]
    wait = ""
    if others:
        waits_in = reports[others[0]].waits_in
        where = f" in {waits_in}" if waits_in else ""
        wait = f"; {_named(others)} wait{'s' if len(others) == 1 else ''}{where}"
    verb = "is" if len(ranks) == 1 else "are"
    return Verdict(list(ranks), f"hang: {behind} {verb} behind: {what}{wait}")


def _doing(report: Report) -> str:
    """Return what a rank that is behind does, where its processes tell."""
    if report.is_stopped:
        return "stopped by SIGSTOP, a terminal or a debugger, "
    if workers := _stopped_workers(report):
        return f"waiting for {workers[0]}, which is stopped, "
    if report.state == "D":
        return "in an uninterruptible wait of the kernel, such as for a disk, "
    if any("/torch/utils/data/dataloader.py" in file for file, _, _ in report.frames):
        pids = [each.pid for each in report.workers if each.name == DATA_WORKER]
        if pids:
            return f"waiting for its data worker{'s' if len(pids) > 1 else ''} ({_list(pids)}), "
    return ""


def _missing(missing: Sequence[int], reports: Mapping[int, Report]) -> str:
    count = "its watcher reports" if len(missing) == 1 else "their watchers report"
    return (
        f"hang: {_named(missing)} may be behind: {count} nothing; the process has ended, or its "
        f"host or disk does not respond. {_everywhere(reports)}"
    )


def _everywhere(reports: Mapping[int, Report]) -> str:
    """Return where all ranks are, ranks in one place together."""
    places: dict[str, list[int]] = {}
    for rank in sorted(reports):
        report = reports[rank]
        place = f"in {report.waits_in}" if report.waits_in else f"at {report.place or report.phase}"
        places.setdefault(place, []).append(rank)
    return "; ".join(f"{_named(ranks)} {place}" for place, ranks in places.items())


def _named(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {_list(ranks)}"


def _list(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:_SHOWN]))
    return f"{shown} and {len(numbers) - _SHOWN} more" if len(numbers) > _SHOWN else shown
