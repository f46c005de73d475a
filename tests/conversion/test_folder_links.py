"""Links in a folder that is imported."""

from __future__ import annotations

import pytest

from megapoly.commands import import_
from megapoly.conversion.folder_links import check_links
from megapoly.errors import CheckpointError


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "models--a--b" / "snapshots" / "0f1e"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def test_files_of_the_hubs_cache_and_of_the_folder(folder):
    blob = folder.parents[1] / "blobs" / "77aa"
    blob.parent.mkdir()
    blob.write_text("{}")
    (folder / "generation_config.json").symlink_to("../../blobs/77aa")
    (folder / "special_tokens_map.json").symlink_to("config.json")
    check_links(folder)


def test_weights_may_be_elsewhere(folder, tmp_path):
    (tmp_path / "big.safetensors").touch()
    (folder / "model.safetensors").symlink_to(tmp_path / "big.safetensors")
    check_links(folder)


@pytest.mark.parametrize(
    "place", ["../../../secret.json", "/etc/passwd", "../other/tokenizer.json"]
)
def test_a_link_to_a_file_elsewhere(folder, place, tmp_path, capsys):
    (tmp_path / "secret.json").write_text("{}")
    (folder / "generation_config.json").symlink_to(place)
    with pytest.raises(CheckpointError, match=r"`generation_config.json` is a link to /"):
        check_links(folder)
    assert import_.main(["--model", str(folder), "--output", str(tmp_path / "out")]) == 2
    assert "is a link to" in capsys.readouterr().err and not (tmp_path / "out").exists()
