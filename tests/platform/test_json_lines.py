"""Lines of JSON on disks that are full, gone and back, and files with damaged lines."""

import errno
import json
import os
import resource
import signal

import pytest

from megapoly.platform.json_lines import LineWriter, drop_lines_after, last_record, lines


@pytest.fixture
def told():
    return []


@pytest.fixture
def small_disk():
    """Return a function that sets the size to which files of this process can grow."""
    previous = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def limit(num_bytes):
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, previous[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, previous)
    signal.signal(signal.SIGXFSZ, handler)


def test_lines_that_a_full_disk_does_not_take_are_written_later(tmp_path, told, small_disk):
    path = tmp_path / "m.jsonl"
    writer = LineWriter(path, told.append)
    records = [{"iteration": i, "x": "y" * 30} for i in range(9)]
    small_disk(200)  # the fourth line is cut
    for record in records[:6]:
        writer.write(record)
    assert path.stat().st_size == 200
    assert len(told) == 1 and "File too large" in told[0] and "kept in memory" in told[0]
    small_disk(resource.RLIM_INFINITY)
    for record in records[6:]:
        writer.write(record)
    writer.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == records
    assert told[1:] == [f"{path} is written again, and is complete"]


def test_lines_that_are_never_taken_are_counted(tmp_path, told, small_disk):
    writer = LineWriter(tmp_path / "m.jsonl", told.append)
    small_disk(30)
    for i in range(4):
        writer.write({"iteration": i})
    writer.close()
    assert "3 lines of" in told[-1] and "bytes are free in" in told[-1]


def test_a_folder_that_is_gone_and_comes_back(tmp_path, told):
    folder = tmp_path / "mounted"
    folder.mkdir()
    path = folder / "m.jsonl"
    folder.rename(tmp_path / "away")
    writer = LineWriter(path, told.append)
    writer.write({"iteration": 1})
    assert "No such file or directory" in told[0]
    assert not folder.exists()
    (tmp_path / "away").rename(folder)
    writer.write({"iteration": 2})
    writer.close()
    assert [line.record["iteration"] for line in lines(path)] == [1, 2]


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EDQUOT])
def test_every_failure_of_a_write_is_survived(tmp_path, told, monkeypatch, number):
    def fails(*args):
        raise OSError(number, os.strerror(number))

    writer = LineWriter(tmp_path / "m.jsonl", told.append)
    with monkeypatch.context() as broken:
        broken.setattr(os, "write", fails)
        writer.write({"iteration": 1})
    assert os.strerror(number) in told[0]
    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", fails)
        writer.write({"iteration": 2})
        writer.flush_to_disk()
    writer.write({"iteration": 3})
    writer.close()
    assert [line.record["iteration"] for line in lines(tmp_path / "m.jsonl")] == [1, 2, 3]


GOOD = [json.dumps({"iteration": i}) for i in range(1, 6)]


def after(step):
    return lambda record: record.get("iteration", 0) > step


def test_lines_after_the_position_and_half_lines_are_dropped(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text("\n".join(GOOD) + '\n{"iterat')
    assert drop_lines_after(path, after(9)) == []
    assert path.read_text().splitlines() == GOOD
    assert drop_lines_after(path, after(3)) == []
    assert path.read_text().splitlines() == GOOD[:3]


@pytest.mark.parametrize("bad", [b"\xff\xfe\x00", b"[1]", b'{"iter', b"null", b""])
def test_a_damaged_line_costs_that_line(tmp_path, bad):
    path = tmp_path / "m.jsonl"
    whole = "\n".join(GOOD).encode()
    path.write_bytes(bad + b"\n" + whole + b"\n")
    assert drop_lines_after(path, after(3)) == [1]
    records = [line.record for line in lines(path)]
    assert records == [None, *map(json.loads, GOOD[:3])]


def test_a_last_line_without_its_end_is_completed(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text("\n".join(GOOD))
    assert drop_lines_after(path, after(5)) == []
    assert path.read_text() == "\n".join(GOOD) + "\n"


def test_the_last_record_is_found_without_reading_the_file(tmp_path):
    path = tmp_path / "m.jsonl"
    assert last_record(path) == {}
    path.write_text("")
    assert last_record(path) == {}
    path.write_text("".join(f'{{"iteration": {i}}}\n' for i in range(5000)) + '{"iteration": 5')
    assert path.stat().st_size > 1 << 16
    assert last_record(path) == {"iteration": 4999}
    with path.open("a") as file:
        file.write("000}\n[]\nno JSON\n")
    assert last_record(path) == {"iteration": 5000}
