"""Entries of ``logging.export``: ``prometheus:PATH.prom`` and ``otlp:http://HOST:4318``."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

PROMETHEUS, OTLP = "prometheus", "otlp"
# Modules that each needs, all of them from the extra `watch`.
MODULES = {
    PROMETHEUS: ("prometheus_client",),
    OTLP: ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http"),
}
_PATH = "/v1/metrics"  # of OTLP over HTTP, below the address of a collector
_SUFFIX = ".prom"  # node_exporter's textfile collector reads no other files


@dataclass(frozen=True)
class Export:
    """Where metrics of a run go.

    Args:
        kind: ``prometheus`` or ``otlp``.
        place: path of a file, or URL of a collector.
    """

    kind: str
    place: str

    @property
    def metrics_url(self) -> str:
        """URL that takes metrics, of a collector's address."""
        return self.place if self.place.endswith(_PATH) else self.place.rstrip("/") + _PATH

    @property
    def problem(self) -> str:
        """What is wrong with it, to follow its name; empty if nothing is."""
        if self.kind == PROMETHEUS:
            if not self.place.endswith(_SUFFIX) or "://" in self.place:
                return "must be a file whose name ends with .prom, such as prometheus:/DIR/run.prom"
            return ""
        if self.kind == OTLP:
            return "" if _is_http(self.place) else "must be a URL such as otlp:http://HOST:4318"
        return "must begin with `prometheus:` and a path, or with `otlp:` and a URL"


def _is_http(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, brackets that are not closed
        return False


def parsed_export(text: str) -> Export:
    """Return an entry of ``logging.export``, right or not."""
    kind, _, place = text.partition(":")
    return Export(kind, place)
