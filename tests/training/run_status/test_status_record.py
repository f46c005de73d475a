"""``status.json``: what is written is read, whatever else is there is a sentence."""

import errno
import json
import math
from dataclasses import fields
from pathlib import Path

import pytest

from megapoly.platform import files
from megapoly.training.run_status.metrics import METRICS
from megapoly.training.run_status.record import (
    NAME,
    RunStatus,
    SavedCheckpoint,
    StatusError,
    job_identity,
    new_status,
    note_failure,
    read_status,
    status_text,
)


def write(folder, status):
    (folder / NAME).write_text(status_text(status))


def test_what_is_written_is_read(tmp_path):
    status = new_status("runs/a", train_iters=9, state="training", step=3)
    status.checkpoint = SavedCheckpoint("runs/a/checkpoints/iter_0000002", 2, 1.5)
    status.validation = {"books": 2.5}
    write(tmp_path, status)
    assert read_status(tmp_path) == status and status.process.pid == status.pid


def test_json_has_every_field_and_no_number_that_it_does_not_know(tmp_path):
    status = RunStatus("runs/a", loss=math.nan, validation={"a": math.inf, "b": 1.0})
    found = json.loads(status_text(status), parse_constant=pytest.fail)
    assert found["loss"] is None and found["validation"] == {"a": None, "b": 1.0}
    assert found.keys() == {field.name for field in fields(RunStatus)}


def test_a_field_of_a_later_version_is_left_out(tmp_path):
    content = json.loads(status_text(RunStatus("a", step=3))) | {"mood": "good"}
    (tmp_path / NAME).write_text(json.dumps(content))
    assert read_status(tmp_path).step == 3


def test_a_run_without_the_file_has_none(tmp_path):
    assert read_status(tmp_path) is None
    assert read_status(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"run_dir": 3}', '{"run_dir": "a", "step": "three"}', "\0" * 20]
    + ['{"run_dir": "a", "state": "happy"}', '{"run_dir": "a", "process": {"pid": 3}}'],
)
def test_a_damaged_file_is_an_error(tmp_path, content):
    (tmp_path / NAME).write_text(content)
    with pytest.raises(StatusError, match="is damaged"):
        read_status(tmp_path)


def test_a_folder_in_its_place_is_an_error(tmp_path):
    (tmp_path / NAME).mkdir()
    with pytest.raises(StatusError, match="cannot be read: Is a directory"):
        read_status(tmp_path)


def test_ids_of_schedulers():
    assert job_identity({}) == {}
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "moe", "SLURM_RESTART_COUNT": "2", "HOME": "/"}
    assert job_identity(slurm) == {
        "slurm_job_id": "7",
        "slurm_job_name": "moe",
        "slurm_restart_count": "2",
    }
    pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "POD_NAME": "moe-0"}
    assert job_identity(pod) == {"pod": "moe-0"}
    assert job_identity({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}).keys() == {"pod"}


def test_a_failure_is_noted_for_its_own_process_alone(tmp_path):
    write(tmp_path, RunStatus("a", state="training", pid=7, step=3, expected_by=9.0))
    note_failure(tmp_path, 8, 4, "hang")
    assert read_status(tmp_path).state == "training"
    note_failure(tmp_path, 7, 4, "hang: rank 1")
    found = read_status(tmp_path)
    assert (found.state, found.exit_status, found.message) == ("failed", 4, "hang: rank 1")
    assert found.step == 3 and found.expected_by is None
    note_failure(tmp_path, 7, 1, "later")
    assert read_status(tmp_path).exit_status == 4


def test_readers_never_see_a_part_and_a_full_disk_takes_it_in_place(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.replace_text(path, "old content")
    seen = []
    replace = Path.replace

    def look(partial, target):
        seen.append((path.read_text(), partial.read_text()))
        return replace(partial, target)

    monkeypatch.setattr(Path, "replace", look)
    files.replace_text(path, "new")
    assert seen == [("old content", "new")] and path.read_text() == "new"

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    files.replace_text(path, "ab")
    assert path.read_text() == "ab"
    with pytest.raises(OSError, match="No space"):
        files.replace_text(tmp_path / "b.json", "x")
    assert [each.name for each in tmp_path.iterdir()] == ["a.json"]


def test_the_page_has_every_field_and_every_metric():
    page = (Path(__file__).parents[3] / "docs/how-to/watch.md").read_text()
    rows = {line.split("`")[1] for line in page.splitlines() if line.startswith("| `")}
    assert {field.name for field in fields(RunStatus)} <= rows
    assert {metric.name for metric in METRICS} <= rows
    for metric in METRICS:
        assert f"| `{metric.name}` | {metric.help} |" in page
