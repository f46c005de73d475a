"""What a conversion may replace, and what remains if it fails."""

import pytest

from megapoly.conversion.output_folder import output_folder, write_json
from megapoly.conversion.parity import ParityError
from megapoly.errors import CheckpointError, DataError


def convert(output, source, *, overwrite=False, error=None):
    with output_folder(output, source=source, overwrite=overwrite) as folder:
        write_json(folder / "parity.json", {"text": "made"})
        if error is not None:
            raise error


@pytest.fixture
def source(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "weights").write_text("of the source")
    return tmp_path / "source"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_failed_comparison_keeps_the_folder(tmp_path, source):
    for _ in range(2):  # the second replaces the first
        with pytest.raises(ParityError, match="kept in .*out.failed"):
            convert(tmp_path / "out", source, error=ParityError("they differ."))
        assert names(tmp_path) == ["out.failed", "source"]
    assert names(tmp_path / "out.failed") == ["parity.json"]


def test_what_is_not_a_failed_conversion_is_left_alone(tmp_path, source):
    (tmp_path / "out.failed").mkdir()
    (tmp_path / "out.failed" / "notes").write_text("mine")
    (tmp_path / "out.failed.1").write_text("a file of mine")
    with pytest.raises(ParityError, match="out.failed.2"):
        convert(tmp_path / "out", source, error=ParityError("they differ."))
    assert (tmp_path / "out.failed" / "notes").read_text() == "mine"
    assert (tmp_path / "out.failed.1").read_text() == "a file of mine"


def test_the_source_is_not_taken_for_a_failed_conversion(tmp_path, source):
    write_json(source / "import.json", {})
    moved = source.rename(tmp_path / "out.failed")
    with pytest.raises(ParityError, match="out.failed.1"):
        convert(tmp_path / "out", moved, error=ParityError("they differ."))
    assert (moved / "weights").read_text() == "of the source"


def test_other_errors_leave_nothing(tmp_path, source):
    for error in (DataError("no"), KeyboardInterrupt(), SystemExit(143)):
        with pytest.raises(type(error)):
            convert(tmp_path / "out", source, error=error)
        assert names(tmp_path) == ["source"]


def test_another_conversion_finished_first(tmp_path, source):
    with pytest.raises(CheckpointError, match="--overwrite"):
        with output_folder(tmp_path / "out", source=source, overwrite=False) as folder:
            (folder / "slow").touch()
            convert(tmp_path / "out", source)
    assert names(tmp_path) == ["out", "source"]
    assert names(tmp_path / "out") == ["parity.json"]
