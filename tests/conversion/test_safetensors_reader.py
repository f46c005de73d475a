"""Which files hold a folder's weights, and names that lead elsewhere."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from megapoly.conversion.safetensors_reader import SafetensorsReader, read_json, weight_files
from megapoly.errors import CheckpointError

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for number, name in enumerate(("model-1", "model-2", "consolidated")):
        save_file({name: torch.full((2,), number)}, folder / f"{name}.safetensors")
    return folder


def write_index(folder, *names):
    weight_map = {f"weight_{i}": name for i, name in enumerate(names)}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_what_transformers_reads_is_read(folder):
    write_index(folder, "model-1.safetensors", "model-2.safetensors")
    with SafetensorsReader(folder) as reader:
        assert reader.names == ["model-1", "model-2"]
    save_file({"whole": torch.ones(1)}, folder / "model.safetensors")
    with SafetensorsReader(folder) as reader:
        assert reader.names == ["whole"]
    (folder / INDEX).unlink()
    with SafetensorsReader(folder) as reader:
        assert reader.names == ["whole"]


@pytest.mark.parametrize(
    "name",
    ["../other.safetensors", "/etc/passwd", "sub/a.safetensors", "model.bin", "..", "", 3, None],
)
def test_an_index_names_files_beside_it(folder, name):
    save_file({"other": torch.ones(1)}, folder.parent / "other.safetensors")
    write_index(folder, "model-1.safetensors", name)
    with pytest.raises(
        CheckpointError, match=r"must name \*.safetensors files beside it; it names"
    ):
        weight_files(folder)


def test_an_index_of_a_missing_file(folder):
    write_index(folder, "model-1.safetensors", "model-3.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks model-3.safetensors\."):
        weight_files(folder)


def test_json_that_nests_without_end(folder):
    (folder / "config.json").write_text('{"a": ' + "[" * 200_000)
    with pytest.raises(CheckpointError, match="must be a JSON file"):
        read_json(folder / "config.json")
