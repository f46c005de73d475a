"""Rules on where the metrics of a run are sent."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from megapoly.config.exports import MODULES, PROMETHEUS, Export, parsed_export
from megapoly.config.options import short
from megapoly.config.rules.facts import Facts, Rule
from megapoly.platform import extras, launcher


def exports_are_possible(facts: Facts) -> Iterator[str]:
    """Entries of `logging.export` are a file of metrics or a collector, each once."""
    entries = facts.config.logging.export or []
    for entry in entries:
        export = parsed_export(entry)
        if export.problem:
            yield f"`logging.export` ({short(entry)}) {export.problem}"
        elif absent := extras.missing(MODULES[export.kind]):
            yield f"`logging.export` ({short(entry)}) needs {extras.with_remedy({'watch': absent})}"
    for entry in dict.fromkeys(entries):
        if entries.count(entry) > 1:
            yield f"`logging.export` has {short(entry)} more than once; once is enough"


def folders_of_exports_exist(facts: Facts) -> Iterator[str]:
    """The folder of a file of metrics exists on rank 0's host, which writes it."""
    if launcher.rank() != 0:
        return
    for export in map(parsed_export, facts.config.logging.export or []):
        if why := _why_not_written(export):
            yield (
                f"`logging.export` (prometheus:{short(export.place)}) {why}; give the folder that "
                "`--collector.textfile.directory` of node_exporter names, and let this user write "
                "there"
            )


def _why_not_written(export: Export) -> str:
    if export.kind != PROMETHEUS or export.problem:
        return ""
    folder = Path(export.place).absolute().parent
    if not folder.is_dir():
        return f"cannot be written: {short(str(folder))} is no folder"
    return "" if os.access(folder, os.W_OK | os.X_OK) else "cannot be written by this user"


RULES: tuple[Rule, ...] = (exports_are_possible, folders_of_exports_exist)
