"""Metrics to an OpenTelemetry collector, by OTLP over HTTP."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.sdk.metrics.export import (
    Gauge,
    Metric,
    MetricExportResult,
    MetricsData,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
)
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from megapoly.training.run_status.metrics import METRICS, run_label, samples_of
from megapoly.training.run_status.record import RunStatus

_TIMEOUT_S = 3.0  # of one export with its retries: at the end, the job waits for the last one
_SCOPE = "megapoly"
_MOST_OF_A_REASON = 200


class OtlpCollector:
    """A collector that is sent the run's metrics every 15 s.

    The exporter is called directly: the periodic reader of OpenTelemetry's SDK starts its thread
    again in every process that is forked, such as those that write checkpoints. Headers,
    certificates and compression are those of OpenTelemetry's variables, such as
    ``OTEL_EXPORTER_OTLP_HEADERS``.

    Args:
        url: that takes metrics.
    """

    period_s = 15.0

    def __init__(self, url: str) -> None:
        self.name, self._num_dropped = url, 0
        self._exporter = OTLPMetricExporter(endpoint=url, timeout=_TIMEOUT_S)
        self._reason = _Reason()
        for name in ("opentelemetry.exporter", "opentelemetry.sdk"):
            log = logging.getLogger(name)  # its lines are one warning here
            log.propagate = False
            log.addHandler(self._reason)

    def publish(self, status: RunStatus) -> None:
        """Send the metrics.

        Raises:
            OSError: the collector did not take them; they are dropped.
        """
        points = [_metric(*each) for each in _points(status)]
        scope = ScopeMetrics(InstrumentationScope(_SCOPE), points, "")
        resource = Resource({"service.name": _SCOPE, "service.instance.id": run_label(status)})
        result = self._exporter.export(MetricsData([ResourceMetrics(resource, [scope], "")]))
        if result is not MetricExportResult.SUCCESS:
            self._num_dropped += sum(len(each.data.data_points) for each in points)
            raise OSError(None, self._reason.text)

    def close(self, status: RunStatus) -> None:
        """Send the last metrics, and end the connection."""
        try:
            self.publish(status)
        finally:
            self._exporter.shutdown()

    @property
    def missing(self) -> str:
        """What it has not taken, as a part of a sentence; "" if nothing."""
        return f"{self._num_dropped} points are missing there" if self._num_dropped else ""


class _Reason(logging.Handler):
    """Keeps the exporter's last message."""

    text = "it does not take them"

    def emit(self, record: logging.LogRecord) -> None:
        self.text = " ".join(record.getMessage().split())[:_MOST_OF_A_REASON].rstrip(".")


def _points(status: RunStatus) -> Iterator[tuple[str, str, list[NumberDataPoint]]]:
    now = time.time_ns()
    for metric in METRICS:
        points = [
            NumberDataPoint(
                attributes=dict(labels), start_time_unix_nano=0, time_unix_nano=now, value=value
            )
            for labels, value in samples_of(metric, status)
        ]
        if points:
            yield metric.name, metric.help, points


def _metric(name: str, text: str, points: list[NumberDataPoint]) -> Metric:
    # No unit: Prometheus's receiver would add it to a name that has it.
    return Metric(name=name, description=text, unit="", data=Gauge(data_points=points))
