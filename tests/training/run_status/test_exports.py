"""Exported metrics, read by Prometheus's parser and by a receiver that decodes OTLP."""

import contextlib
import http.server
import shutil
import socket
import subprocess
import threading
from pathlib import Path

import pytest
import spiking_jobs
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from prometheus_client.parser import text_string_to_metric_families
from tiny_jobs import TINY

from megapoly.training.run_status.metrics import METRICS
from megapoly.training.run_status.otlp import OtlpCollector
from megapoly.training.run_status.prometheus import PrometheusFile, prometheus_text
from megapoly.training.run_status.record import RunStatus, SavedCheckpoint, read_status

OPTIONS = TINY | {"training.train_iters": 4, "training.eval_interval": 2, "training.eval_iters": 1}
EVERYTHING = RunStatus(
    'runs/a "b"\\\n',
    train_iters=240,
    state="training",
    updated=1.5e9,
    expected_by=1.6e9,
    started=1.4e9,
    step=37,
    last_step=1.45e9,
    step_time_s=0.25,
    eta_s=50.0,
    loss=2.5,
    grad_norm=0.5,
    learning_rate=1e-3,
    tokens_per_second=1e6,
    mfu=0.4,
    consumed_tokens=10**12,
    spikes=2,
    skipped_steps=1,
    validation={"books": 3.25, "code": None},
    tasks={"piqa": 51.0},
    slowest_rank_ratio=1.2,
    memory_bytes=10**9,
    gpu_memory_bytes=10**10,
    checkpoint=SavedCheckpoint("c", 30, 1.44e9),
    save_interval=10,
    host="n1",
    world_size=8,
    layout="data 8",
    job={"pod": "a-0"},
    exit_status=0,
    megapoly_version="1",
)


class Collector:
    """A receiver of OTLP over HTTP that keeps what it is sent."""

    def __init__(self, status=200, never_answers=False):
        received, self.is_free = [], threading.Event()
        collector = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                if never_answers:
                    collector.is_free.wait()
                    return
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if status == 200:
                    received.append((self.path, ExportMetricsServiceRequest.FromString(body)))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(ExportMetricsServiceResponse().SerializeToString())

            def log_message(self, *args):
                pass

        self.received = received
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        self.thread = threading.Thread(target=self.server.serve_forever, args=[0.05])
        self.thread.start()
        return self

    def __exit__(self, *exc_info):
        self.is_free.set()
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@contextlib.contextmanager
def refusing_port():
    """A port that this process has and on which nobody listens."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def samples_of_prometheus(text):
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def samples_of_otlp(request):
    (resource,) = request.resource_metrics
    (scope,) = resource.scope_metrics
    return {
        (
            metric.name,
            tuple(sorted((each.key, each.value.string_value) for each in point.attributes)),
        ): point.as_double
        for metric in scope.metrics
        for point in metric.gauge.data_points
    }


def value(samples, name, **labels):
    (found,) = [
        number
        for (sample, its), number in samples.items()
        if sample == name and labels.items() <= dict(its).items()
    ]
    return found


def test_every_metric_is_in_the_text_with_its_value():
    samples = samples_of_prometheus(prometheus_text(EVERYTHING))
    assert {name for name, _ in samples} == {metric.name for metric in METRICS}
    # Runs of two users have one relative path; their files must not have the same series.
    run = str(Path.cwd() / 'runs/a "b"\\\n')
    assert value(samples, "megapoly_loss", run=run, host="n1") == 2.5
    assert value(samples, "megapoly_run_state", state="training") == 1.0
    assert value(samples, "megapoly_run_state", state="failed") == 0.0
    assert value(samples, "megapoly_validation_loss", set="books") == 3.25
    assert value(samples, "megapoly_validation_loss", set="code") != 3.25  # NaN: not finite
    assert value(samples, "megapoly_consumed_tokens") == 1e12
    assert value(samples, "megapoly_checkpoint_step") == 30
    assert value(samples, "megapoly_run_info", pod="a-0", layout="data 8") == 1.0


def test_what_is_not_known_is_left_out():
    samples = samples_of_prometheus(prometheus_text(RunStatus("a")))
    names = {name for name, _ in samples}
    assert "megapoly_loss" not in names and "megapoly_checkpoint_step" not in names
    assert value(samples, "megapoly_step") == 0.0


def test_a_collector_gets_the_same_as_prometheus():
    text = prometheus_text(EVERYTHING)
    with Collector() as collector:
        target = OtlpCollector(collector.url + "/v1/metrics")
        target.publish(EVERYTHING)
        target.close(EVERYTHING)
    (path, request), _ = collector.received
    assert path == "/v1/metrics"
    expected = samples_of_prometheus(text)
    found = samples_of_otlp(request)
    assert repr(sorted(found.items())) == repr(sorted(expected.items()))
    attributes = request.resource_metrics[0].resource.attributes
    assert {each.key: each.value.string_value for each in attributes}["service.name"] == "megapoly"
    point = request.resource_metrics[0].scope_metrics[0].metrics[0].gauge.data_points[0]
    assert point.time_unix_nano > 1.6e18


@pytest.mark.parametrize("status", [400, 404])
def test_a_collector_that_refuses_counts_what_it_did_not_take(status):
    with Collector(status) as collector:
        target = OtlpCollector(collector.url + "/v1/metrics")
        with pytest.raises(OSError) as error:
            target.publish(RunStatus("a"))
        assert str(status) in error.value.strerror or "Bad Request" in error.value.strerror
        first = int(target.missing.split()[0])
        with pytest.raises(OSError):
            target.close(RunStatus("a"))
    assert first > 5 and target.missing == f"{2 * first} points are missing there"


def test_a_run_exports_to_a_file_and_to_a_collector(tmp_path):
    file = tmp_path / "metrics" / "run.prom"
    file.parent.mkdir()
    with Collector() as collector:
        entries = f"[prometheus:{file}, 'otlp:{collector.url}']"
        job = spiking_jobs.train(tmp_path / "run", OPTIONS | {"logging.export": entries})
    last = job.metrics[-1]
    for samples in (
        samples_of_prometheus(file.read_text()),
        samples_of_otlp(collector.received[-1][1]),
    ):
        assert value(samples, "megapoly_run_state", state="complete") == 1.0
        assert value(samples, "megapoly_loss") == last["lm_loss"]
        assert value(samples, "megapoly_validation_loss", set="books") == last["val/books/loss"]
        assert value(samples, "megapoly_last_step_timestamp_seconds") <= last["time"] + 1e-3
    assert file.stat().st_mode & 0o777 == 0o644
    assert [path.name for path in file.parent.iterdir()] == ["run.prom"]


def test_losses_do_not_depend_on_a_collector_that_is_down_or_silent(tmp_path):
    alone = spiking_jobs.train(tmp_path / "alone", OPTIONS)
    with refusing_port() as port, Collector(never_answers=True) as silent:
        entries = f"['otlp:http://127.0.0.1:{port}', 'otlp:{silent.url}']"
        job = spiking_jobs.train(tmp_path / "run", OPTIONS | {"logging.export": entries})
    assert [line["lm_loss"] for line in job.metrics] == [line["lm_loss"] for line in alone.metrics]
    assert read_status(tmp_path / "run").state == "complete"
    (line,) = [line for line in job.printed if f"{port}/v1/metrics: " in line]
    assert line.endswith(" points are missing there")


def test_a_file_of_metrics_that_cannot_be_written_is_no_file_of_a_part(tmp_path):
    target = PrometheusFile(tmp_path / "gone" / "a.prom")
    with pytest.raises(FileNotFoundError):
        target.publish(EVERYTHING)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("promtool") is None, reason="Debian's prometheus has promtool")
def test_promtool_accepts_the_text():
    text = prometheus_text(EVERYTHING)
    done = subprocess.run(["promtool", "check", "metrics"], input=text, text=True, timeout=60)
    assert done.returncode == 0
