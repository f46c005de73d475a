"""Alerts and dashboard use metrics that runs export, and fire when they should."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from megapoly.training.run_status.metrics import METRICS

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "monitoring"
NAMES = {metric.name for metric in METRICS}
LABELS = {"run", "host", "state", "set", "task", "layout", "version", "slurm_job_id", "pod"}


def expressions_of_dashboard():
    dashboard = json.loads((FOLDER / "grafana.json").read_text())
    variables = [each["definition"] for each in dashboard["templating"]["list"][1:]]
    return variables + [
        target["expr"] for panel in dashboard["panels"] for target in panel["targets"]
    ]


def rules():
    groups = yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def test_every_metric_that_is_used_exists():
    expressions = expressions_of_dashboard() + [rule["expr"] for rule in rules()]
    used = {name for text in expressions for name in re.findall(r"\bmegapoly_\w+", text)}
    assert len(used) > 20
    assert not used - NAMES
    labels = {name for text in expressions for name in re.findall(r"(\w+)=~?\"", text)}
    assert labels <= LABELS


def test_recorded_series_are_those_that_alerts_use():
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    used = {name for rule in rules() for name in re.findall(r"\bmegapoly:\w+", rule["expr"])}
    assert recorded == used


def test_every_alert_says_of_which_run_and_has_a_test_of_its_behaviour():
    alerts = {rule["alert"]: rule for rule in rules() if "alert" in rule}
    for rule in alerts.values():
        assert "{{ $labels.run }}" in rule["annotations"]["summary"]
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
    tests = yaml.safe_load((ROOT / "tests/examples/alerts_test.yaml").read_text())["tests"]
    fires = {
        test["alertname"]
        for each in tests
        for test in each["alert_rule_test"]
        if test["exp_alerts"]
    }
    assert fires == alerts.keys()


def test_the_dashboard_takes_its_data_source_from_a_variable():
    dashboard = json.loads((FOLDER / "grafana.json").read_text())
    sources = {
        json.dumps(each["datasource"])
        for panel in dashboard["panels"]
        for each in (panel, *panel["targets"])
    }
    assert sources == {'{"type": "prometheus", "uid": "${datasource}"}'}
    assert [each["name"] for each in dashboard["templating"]["list"]] == ["datasource", "run"]
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    cells = [
        (x, y)
        for panel in dashboard["panels"]
        for place in [panel["gridPos"]]
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24  # no two overlap


@pytest.mark.cluster
@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "rules", "examples/monitoring/alerts.yaml"],
        ["test", "rules", "tests/examples/alerts_test.yaml"],
    ],
)
def test_promtool_accepts_the_alerts_and_they_fire(arguments):
    assert shutil.which("promtool"), "promtool is missing: apt-get install prometheus"
    done = subprocess.run(
        ["promtool", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
