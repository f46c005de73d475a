"""report.json: everything that a page shows, read from runs and earlier reports and merged."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from megapoly.errors import DataError
from megapoly.study.comparison.outcome import read_comparison
from megapoly.study.report.grouping import group_runs
from megapoly.study.report.runs import Run, read_run, to_record

FORMAT = 1
FILE = "report.json"
_DIGITS = 5
# Fields of a run, with what they are then.
_NOT_IN_EARLIER_REPORTS: dict[str, Any] = {"task_errors": {}, "consumed_samples": None}
_OF_A_COMPARISON = ("commands", "hardware", "versions")


@dataclass(frozen=True)
class Content:
    """Content of a page.

    Args:
        title: of the page.
        reference: activation that the others are compared with.
        runs: complete or not; the later one of two records of the same run.
        comparisons: ``commands``, ``hardware`` and ``versions`` of each comparison.json, by key.
        notes: Markdown of the author.
        theory: content of theory.json.
        theory_folder: folder of that file, for the command that the page shows.
    """

    title: str
    reference: str
    runs: list[Run]
    comparisons: dict[str, dict[str, Any]]
    notes: str = ""
    theory: dict[str, Any] | None = None
    theory_folder: str | None = None


def read(sources: Sequence[Path]) -> Content:
    """Read and merge runs, folders of runs and report.json files.

    Args:
        sources: a later record of the same run replaces an earlier one; so do later titles, notes
            and theories.

    Returns:
        Title and reference are empty unless a report.json contains them.

    Raises:
        DataError: one of the sources contains no run.
        MegapolyError: a file cannot be read.
    """
    runs: dict[str, Run] = {}
    merged: dict[str, Any] = {"title": "", "reference": "", "notes": "", "comparisons": {}}
    for source in sources:
        part = _saved(source) if source.is_file() else {"runs": _found(source, merged)}
        for key in ("title", "reference", "notes", "theory", "theory_folder"):
            if part.get(key):
                merged[key] = part[key]
        merged["comparisons"] |= part.get("comparisons", {})
        for run in part["runs"]:
            runs[run.key] = run
    return Content(runs=list(runs.values()), **merged)


def write(content: Content, path: Path) -> None:
    """Write report.json, one line for each run, with the analyses that the page shows."""
    groups = group_runs(content.runs, content.reference)
    analysed = [entry.analysed for group in groups for entry in group.entries]
    shown = {run.key for run in analysed if run is not None}
    values = {
        "format": FORMAT,
        "title": content.title,
        "reference": content.reference,
        "notes": content.notes,
        "comparisons": content.comparisons,
        "theory_folder": content.theory_folder,
        "theory": _rounded(content.theory),
    }
    lines = [f'"{key}": {_json(value)}' for key, value in values.items()]
    runs = [
        _json({**to_record(run), "analysis": _rounded(run.analysis) if run.key in shown else None})
        for run in content.runs
    ]
    lines.append('"runs": [\n' + ",\n".join(runs) + "\n]")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _json(value: Any) -> str:
    return json.dumps(value, allow_nan=False)


def _saved(path: Path) -> dict[str, Any]:
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        if saved["format"] != FORMAT:
            raise DataError(
                f"`{path}` has format {saved['format']}; must be {FORMAT}. Write it again from its "
                "runs."
            )
        names = {field.name for field in fields(Run)}
        records = [_NOT_IN_EARLIER_REPORTS | record for record in saved["runs"]]
        saved["runs"] = [Run(**{name: record[name] for name in names}) for record in records]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"`{path}` is not a report.json ({type(error).__name__}: {error}); give the folder of "
            "a run, a folder of runs or the report.json of a report."
        ) from error
    return dict(saved)


def _found(folder: Path, merged: dict[str, Any]) -> list[Run]:
    """Return the runs in a folder, at any depth, and add their comparisons to ``merged``."""
    if not folder.exists():
        raise DataError(f"`{folder}` does not exist; give the folder of a run or of several.")
    runs = []
    for run_folder in _run_folders(folder):
        comparison = read_comparison(run_folder.parent)
        key = None
        if comparison is not None:
            key = run_folder.resolve().parent.name
            comparison = _from_here(comparison)
            others = merged["comparisons"].get(key)
            if others is not None and others["commands"] != comparison["commands"]:
                key = f"{run_folder.resolve().parent.parent.name}/{key}"
            merged["comparisons"][key] = {k: comparison.get(k) for k in _OF_A_COMPARISON}
        trial = (comparison or {}).get("trials", {}).get(run_folder.resolve().name)
        found = read_run(run_folder, comparison=key, trial=trial)
        runs.append(replace(found, analysis=_from_here(found.analysis)))
    if not runs:
        raise DataError(
            f"`{folder}` contains no run, which is a folder with `config.yaml` and `metrics.jsonl`."
        )
    return runs


def _run_folders(folder: Path) -> Iterator[Path]:
    if (folder / "config.yaml").is_file() and (folder / "metrics.jsonl").is_file():
        yield folder
    else:
        for inner in sorted(path for path in folder.iterdir() if path.is_dir()):
            yield from _run_folders(inner)


def _from_here(value: Any) -> Any:
    """Return a value whose text has paths relative to the current folder."""
    if isinstance(value, str):
        return value.replace(f"{Path.cwd()}/", "")
    if isinstance(value, list):
        return [_from_here(item) for item in value]
    if isinstance(value, dict):
        return {key: _from_here(item) for key, item in value.items()}
    return value


def _rounded(value: Any) -> Any:
    """Round numbers to five digits, more than a figure shows."""
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return value
