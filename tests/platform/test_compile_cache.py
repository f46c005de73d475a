"""The folder from which torch.compile loads code."""

from __future__ import annotations

import os
import tempfile

import pytest
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from megapoly.errors import UnavailableError
from megapoly.platform.compile_cache import VARIABLE, check_compile_cache, default_folder
from megapoly.platform.device import select_platform


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """An empty folder for temporary files; the path of the cache in it."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return default_folder()


@pytest.mark.parametrize("user", ["ada", r"domain\ada:1"])
def test_the_folder_is_torchs(tmp_path, monkeypatch, user):
    monkeypatch.setenv("LOGNAME", user)
    assert str(default_folder()) == default_cache_dir()
    assert default_folder().parent == tmp_path


def test_an_id_without_a_name_has_torchs_folder(monkeypatch):
    def no_name():
        raise KeyError("no entry in the password database")

    monkeypatch.setattr("getpass.getuser", no_name)
    assert str(default_folder()) == default_cache_dir()


def test_a_folder_of_this_user_is_made_and_accepted(place):
    check_compile_cache()
    assert place.is_dir() and place.stat().st_mode & 0o777 == 0o700
    check_compile_cache()


def of_another(place, monkeypatch):
    place.mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: place.stat().st_uid + 1)
    if place.stat().st_uid == 0:
        os.chown(place, 1234, -1)
        monkeypatch.setattr(os, "geteuid", lambda: 0)


def open_to_all(place, monkeypatch):
    place.mkdir()
    place.chmod(0o1777)


def a_link(place, monkeypatch):
    (place.parent / "elsewhere").mkdir()
    place.symlink_to(place.parent / "elsewhere")


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (of_another, r"belongs to the user with id \d+"),
        (open_to_all, "may be written by every user"),
        (a_link, "is not a folder"),
    ],
)
def test_what_another_user_could_have_filled_is_refused(place, monkeypatch, prepare, reason):
    prepare(place, monkeypatch)
    with pytest.raises(UnavailableError, match=f"`{place}` {reason}"):
        select_platform("cpu")
    monkeypatch.setenv(VARIABLE, str(place))  # named by the user
    check_compile_cache()
