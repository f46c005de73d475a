import errno
import os

import pytest

from megapoly.errors import DataError
from megapoly.platform.files import free_space, is_plain_name, renamed_when_complete, write_text


@pytest.mark.parametrize("in_folder", [False, True])
def test_files_get_their_names_when_all_are_complete(tmp_path, in_folder):
    work = tmp_path / "work"
    work.mkdir()
    paths = [tmp_path / "a", tmp_path / "new" / "b"]
    with renamed_when_complete(*paths, folder=work if in_folder else None) as temporary:
        for path, content in zip(temporary, "ab", strict=True):
            path.write_text(content)
        assert not any(path.exists() for path in paths)
        assert [path.name for path in work.iterdir()] == [p.name for p in temporary] * in_folder
    assert [path.read_text() for path in paths] == ["a", "b"]
    assert not any(path.exists() for path in temporary)


@pytest.mark.parametrize("in_folder", [False, True])
def test_nothing_is_left_when_one_file_is_missing(tmp_path, in_folder):
    paths = [tmp_path / "a", tmp_path / "b"]
    folder = tmp_path if in_folder else None
    with pytest.raises(FileNotFoundError), renamed_when_complete(*paths, folder=folder) as (a, _):
        a.write_text("a")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a", "a.b", ".a", "...", "a b"])
def test_names_of_files_beside_another(name):
    assert is_plain_name(name)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "/", "/a", "a/", "a/b", "../a", "./a", 3, None, []]
)
def test_paths_and_other_values_are_no_names(name):
    assert not is_plain_name(name)


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "No space is left to write `{path}`: No space left on device, .* are free"),
        (errno.EDQUOT, "No space is left to write `{path}`: Disk quota exceeded"),
        (errno.EROFS, "`{path}` cannot be written: Read-only file system"),
        (errno.ESTALE, "`{path}` cannot be written: Stale file handle"),
        (errno.EIO, "`{path}` cannot be written: Input/output error"),
        (errno.EACCES, r"`{path}` cannot be written: Permission denied .*that you may write to"),
        (errno.EPERM, "`{path}` cannot be written: Operation not permitted"),
    ],
)
def test_a_disk_that_takes_nothing_is_one_sentence_and_the_file_stays(
    tmp_path, monkeypatch, number, message
):
    def fails(descriptor):
        raise OSError(number, os.strerror(number))

    path = tmp_path / "a"
    write_text(path, "old")
    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(DataError, match=message.format(path=path)):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("place", ["a", "folder"])
def test_what_has_the_name_of_a_file_or_of_its_folder_is_named(tmp_path, place):
    path = tmp_path / "folder" / "a"
    in_the_way = tmp_path / "folder" if place == "folder" else path
    if place == "folder":
        in_the_way.write_text("a file")
    else:
        in_the_way.mkdir(parents=True)
    message = rf"`{path}` cannot be written: .* \({in_the_way}\). Move what has this name"
    with pytest.raises(DataError, match=message):
        write_text(path, "new")
    assert list((tmp_path / "folder").parent.rglob("*.tmp")) == []


def test_free_space_of_a_file_that_does_not_exist(tmp_path):
    assert free_space(tmp_path / "no" / "file").endswith(f" bytes are free in {tmp_path}")
