"""Metrics as a text file for node_exporter's textfile collector."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily

from megapoly.platform.files import replace_text
from megapoly.training.run_status.metrics import METRICS, samples_of
from megapoly.training.run_status.record import RunStatus


class PrometheusFile:
    """A text file of the run's metrics, replaced at once.

    Prometheus scrapes every 15 s or more; node_exporter runs as another user, who may read it.

    Args:
        path: of the file.
    """

    period_s, missing = 5.0, ""

    def __init__(self, path: Path) -> None:
        self._path, self.name = path, str(path)

    def publish(self, status: RunStatus) -> None:
        """Write the file."""
        replace_text(self._path, prometheus_text(status), mode=0o644)

    close = publish


def prometheus_text(status: RunStatus) -> str:
    """Return the metrics in Prometheus's text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(status))
    return generate_latest(registry).decode()


class _Collector:
    def __init__(self, status: RunStatus) -> None:
        self._status = status

    def collect(self) -> Iterator[GaugeMetricFamily]:
        for metric in METRICS:
            samples = list(samples_of(metric, self._status))
            if samples:
                family = GaugeMetricFamily(metric.name, metric.help, labels=list(samples[0][0]))
                for labels, value in samples:
                    family.add_metric(list(labels.values()), value)
                yield family
