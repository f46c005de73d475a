"""``megapoly status``: tables, JSON, sentences and exit statuses."""

import fcntl
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from processes import wait_until
from rich.console import Console

from megapoly.commands import status as command
from megapoly.platform.identity import own_identity
from megapoly.training.run_lock import sole_job
from megapoly.training.run_status.columns import COLUMNS
from megapoly.training.run_status.reading import read_run
from megapoly.training.run_status.record import (
    NAME,
    SavedCheckpoint,
    new_status,
    status_text,
)
from megapoly.training.run_status.view import show

ROOT = Path(__file__).parents[2]
GONE = replace(own_identity(), pid=2**22 + 1)


def make_run(folder, **values):
    """Write the status of a run that trains well, changed."""
    now = time.time()
    status = new_status(str(folder), train_iters=240, state="training", phase="step", step=37)
    status.last_step, status.expected_by, status.loss = now - 3, now + 60, 2.5
    status.tokens_per_second, status.step_time_s, status.eta_s = 1234.5, 0.5, 5400.0
    status.validation, status.world_size = {"books": 2.75}, 8
    status.checkpoint = SavedCheckpoint(f"{folder}/checkpoints/iter_0000030", 30, now - 65)
    folder.mkdir(parents=True)
    (folder / NAME).write_text(status_text(replace(status, **values)))
    return folder


def make_earlier_run(folder, *, steps=2, total=6, with_time=False):
    """Write the files of a run of a version that knew no status.json."""
    folder.mkdir(parents=True)
    lines = [
        {"iteration": i, "lm_loss": 5.0 - i, "consumed_tokens": 64 * i, "tokens_per_second": 10.0}
        | ({"time": 1000.0 + i} if with_time else {})
        for i in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (folder / "config.yaml").write_text(f"model:\n  x: 1\ntraining:\n  train_iters: {total}\n")
    return folder


def run(capsys, *arguments):
    status = command.main([str(each) for each in arguments])
    return status, capsys.readouterr().out


def start(*arguments, **options):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "megapoly", "status", *map(str, arguments)],
        env=environment,
        text=True,
        **options,
    )


def test_piped_columns_are_words_that_programs_can_split(tmp_path, capsys):
    make_run(tmp_path / "a")
    make_run(tmp_path / "long name/b", state="complete", step=240, expected_by=None)
    make_earlier_run(tmp_path / "c")
    status, text = run(capsys, tmp_path)
    header, *rows, note = text.splitlines()
    assert status == 0 and header.split()[:3] == ["run", "state", "step"]
    table = [dict(zip(header.split(), row.split(), strict=True)) for row in rows]
    assert [row["state"] for row in table] == ["training", "unknown", "complete"]
    assert table[0]["step"] == "37/240" and table[0]["loss"] == "2.5000"
    assert table[0]["tokens/s"] == "1,234" and table[0]["saved"] == "30"
    assert table[0]["ETA"] == "90_min" and table[2]["ETA"] == "-"
    assert table[1]["step"] == "2/6" and table[1]["loss"] == "3.0000"
    assert note == (
        f"{tmp_path}/c: no job of this host trains it, after step 2 of 6; it has no status.json"
    )


@pytest.mark.parametrize("width", [40, 80, 120, 200])
def test_a_terminal_of_any_width_shows_whole_cells(tmp_path, width):
    names = ("moe_7b_released", "dense_1b", "x")
    runs = []
    for name in names:
        folder = make_run(tmp_path / name)
        seen = read_run(folder, time.time())
        runs.append(replace(seen, folder=Path("runs") / name))
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(show(runs, console))
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]
    assert len(lines) == 4 and max(map(len, lines)) <= width
    assert "…" not in "".join(lines)
    for line, name in zip(lines[1:], names, strict=True):
        assert line.startswith(f"runs/{name} ") and " training " in line and "37/240" in line
    is_shown = [column.title for column in COLUMNS if column.title in lines[0]]
    assert len(is_shown) >= {40: 3, 80: 7, 120: 12, 200: 12}[width]


@pytest.mark.parametrize("width", [80, 120])
def test_one_run_in_detail(tmp_path, width):
    folder = make_run(tmp_path / "a", job={"slurm_job_id": "77"}, mfu=0.412)
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(show([read_run(folder, time.time())], console))
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    for part in (
        "state training after step 37 of 240, 3 s ago",
        "37/240, 15.4%, 90 min left",
        "train 2.5000, books 2.7500",
        "1,234 tokens/s, 0.5 s a step, 41.2 % MFU",
        "iter_0000030, saved 65 s ago; a crash now would cost 7 steps, 4 s",
        "8 ranks, slurm_job_id 77",
    ):
        assert part in " ".join(text.split()), part


def test_markup_in_a_name_is_text(tmp_path):
    folder = make_run(tmp_path / "[red]a[/]", state="failed", message="[/nothing]", process=None)
    console = Console(file=io.StringIO(), width=200, force_terminal=True, color_system=None)
    seen = read_run(folder, time.time())
    console.print(show([seen], console))
    console.print(show([seen, seen], console))
    assert console.file.getvalue().count("[red]a[/]") == 5
    assert console.file.getvalue().count("[/nothing]") == 3


def test_json_is_a_list_of_objects(tmp_path, capsys):
    make_run(tmp_path / "a")
    make_earlier_run(tmp_path / "b", with_time=True)
    status, text = run(capsys, tmp_path, "--json")
    a, b = json.loads(text, parse_constant=pytest.fail)
    assert status == 0
    assert (a["folder"], a["step"], a["checkpoint"]["step"]) == (str(tmp_path / "a"), 37, 30)
    assert a["health"]["is_well"] and a["health"]["state"] == "training"
    assert 3 <= a["age_s"] < 3000
    assert (b["state"], b["step"], b["last_step"], b["loss"]) == ("unknown", 2, 1002.0, 3.0)
    assert b["consumed_tokens"] == 128 and b["host"] is None


CHECKS = [
    (dict(), 0, "training after step 37 of 240, "),
    (dict(state="complete", process=GONE), 0, "complete after step 37"),
    (dict(state="stopped", process=GONE), 0, "stopped on request after step 37 of 240"),
    (dict(process=GONE), 1, "ended without a word"),
    (dict(expected_by=5.0), 1, "no sign of life for "),
    (dict(state="failed", exit_status=3, message="nan"), 1, "failed with status 3 after step"),
]


@pytest.mark.parametrize(("values", "expected", "words"), CHECKS)
def test_check(tmp_path, capsys, values, expected, words):
    folder = make_run(tmp_path / "a", **values)
    status, text = run(capsys, folder, "--check")
    assert status == expected
    assert len(text.splitlines()) == 1 and text.startswith(f"{folder}: {words}")


def test_one_run_that_is_ill_is_enough(tmp_path, capsys):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", process=GONE)
    status, text = run(capsys, tmp_path, "--check")
    assert status == 1 and len(text.splitlines()) == 2


def test_check_of_what_is_no_run_or_damaged(tmp_path, capsys):
    status, text = run(capsys, tmp_path / "none", "--check")
    assert status == 1 and "which does not exist: no run has begun there" in text
    folder = make_run(tmp_path / "a")
    (folder / NAME).write_text('{"run_dir": "a", "sta')
    status, text = run(capsys, folder, "--check")
    assert status == 1 and "its status.json is damaged (" in text
    assert len(text.splitlines()) == 1
    status, text = run(capsys, folder)
    assert status == 0 and " unknown " in text


def test_a_run_of_an_earlier_version_is_known_by_its_lock_and_its_steps(tmp_path, capsys):
    folder = make_earlier_run(tmp_path / "a")
    assert run(capsys, folder, "--check")[0] == 1
    with sole_job(folder):
        before = (folder / ".lock").read_bytes()
        status, text = run(capsys, folder, "--check")
        assert status == 0 and "a job holds its lock, after step 2 of 6" in text
        with (folder / ".lock").open() as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert (folder / ".lock").read_bytes() == before
    assert run(capsys, folder, "--check")[0] == 1
    complete = make_earlier_run(tmp_path / "b", steps=6)
    status, text = run(capsys, complete, "--check")
    assert status == 0 and "complete after step 6 of 6" in text


def test_runs_are_found_below_folders_and_not_in_runs(tmp_path, capsys):
    names = ["b/seed_1", "b/seed_2", "a", "b/c/d/e"]
    for name in names:
        make_run(tmp_path / name)
    make_run(tmp_path / "a/checkpoints/x")
    make_run(tmp_path / ".hidden/x")
    (tmp_path / "loop").symlink_to(tmp_path)
    _, text = run(capsys, tmp_path / "b", tmp_path / "a", "--json")
    found = [each["folder"].removeprefix(f"{tmp_path}/") for each in json.loads(text)]
    assert found == ["b/c/d/e", "b/seed_1", "b/seed_2", "a"]


def test_a_folder_without_runs_and_options_without_effect_are_refused(tmp_path, capsys):
    assert command.main([str(tmp_path)]) == 2
    assert "no run has begun there" in capsys.readouterr().err
    for options in (["--interval", "3"], ["--watch", "--json"], ["--watch", "--interval", "0"]):
        with pytest.raises(SystemExit) as ended:
            command.main([str(tmp_path), *options])
        assert ended.value.code == 2


def test_a_probe_imports_neither_torch_nor_numpy_and_changes_nothing(tmp_path):
    folder = make_run(tmp_path / "a")
    before = {path: path.stat().st_mtime_ns for path in (folder, folder / NAME)}
    program = (
        "import sys; from megapoly.commands import main; status = main(sys.argv[1:]);"
        "print(sorted({'torch', 'numpy', 'megatron', 'rich'} & set(sys.modules))); sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "status", str(folder), "--check"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1] == "[]"
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_watch_ends_with_status_0_by_ctrl_c(tmp_path):
    """In a terminal, on the alternate screen, which it leaves."""
    folder = make_run(tmp_path / "a")
    controller, terminal = pty.openpty()
    process = start(folder, "--watch", "--interval", "0.1", stdout=terminal, stderr=terminal)
    os.close(terminal)
    seen = b""

    def has_shown_twice():
        nonlocal seen
        seen += os.read(controller, 4096)
        return seen.count(b"37/240") >= 2

    wait_until(has_shown_twice)
    process.send_signal(signal.SIGINT)
    try:
        while data := os.read(controller, 4096):
            seen += data
    except OSError:  # the other side is closed
        pass
    os.close(controller)
    assert process.wait() == 0
    assert b"\x1b[?1049h" in seen and b"\x1b[?1049l" in seen and b"Traceback" not in seen


def test_watch_ends_quietly_with_its_reader(tmp_path):
    folder = make_run(tmp_path / "a")
    process = start(folder, "--watch", "--interval", "0.1", stdout=-1, stderr=-1)
    assert process.stdout.readline().startswith("run ")
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait() == 2


def test_watch_of_a_run_that_is_not_there_yet_is_refused(tmp_path, capsys):
    assert command.main([str(tmp_path / "none"), "--watch"]) == 2
    assert re.search("which does not exist", capsys.readouterr().err)


def test_a_terminal_shows_a_study_whose_runs_ended_in_every_way(tmp_path):
    states = {
        "a": dict(state="complete", step=240),
        "b": dict(state="failed", exit_status=3, message="loss is nan"),
        "c": dict(process=GONE),
        "d": dict(expected_by=1.0),
    }
    runs = [read_run(make_run(tmp_path / name, **v), time.time()) for name, v in states.items()]
    console = Console(file=io.StringIO(), width=300, force_terminal=True, color_system=None)
    console.print(show(runs, console))
    table = console.file.getvalue()
    for state in ("complete", "failed", "dead", "silent"):
        assert f"  {state}" in table
    notes = table.splitlines()[5:]
    assert [note.split(": ")[0] for note in notes] == [str(tmp_path / name) for name in "bcd"]
