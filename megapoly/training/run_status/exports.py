"""Where ``logging.export`` sends the metrics of a run."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from megapoly.config.exports import PROMETHEUS, parsed_export
from megapoly.platform import extras
from megapoly.training.run_status.target import Target


def opened_exports(entries: Iterable[str]) -> list[Target]:
    """Return the targets of the entries of ``logging.export``, which the rules have accepted.

    Raises:
        UnavailableError: a package that one needs cannot be imported.
    """
    return [_opened(entry) for entry in entries]


def _opened(entry: str) -> Target:
    export = parsed_export(entry)
    try:
        if export.kind == PROMETHEUS:
            from megapoly.training.run_status.prometheus import PrometheusFile

            return PrometheusFile(Path(export.place))
        from megapoly.training.run_status.otlp import OtlpCollector

        return OtlpCollector(export.metrics_url)
    except ImportError as error:
        raise extras.unavailable("`logging.export`", "watch", [error.name or entry]) from error
