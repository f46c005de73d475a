"""Opening a folder, and what it says of those that hold no model."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megapoly.errors import CheckpointError, UnavailableError
from megapoly.evaluation.models import open_model

OPTIONS = {"dtype": "auto", "device": "cpu", "batch_size": 2}


@pytest.fixture
def copied(export, tmp_path):
    return shutil.copytree(export, tmp_path / "copy")


def test_a_model_as_it_is_stored(export, copied):
    config = json.loads((copied / "config.json").read_text())
    assert open_model(copied, **OPTIONS).model.dtype == torch.float32
    (copied / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    lm = open_model(copied, **OPTIONS)
    assert lm.model.dtype == torch.bfloat16 and lm.softmax_dtype == torch.float32
    assert lm.batch_size == 2 and lm.max_length == 512
    stored = load_file(export / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(lm.model.model.layers[1].mlp.up_proj.weight, stored.bfloat16())
    float32 = open_model(copied, **OPTIONS | {"dtype": "float32"})
    assert float32.model.dtype == torch.float32


def test_neither_a_model_nor_a_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"is no model: .* has a config.json$"):
        open_model(tmp_path, **OPTIONS)
    with pytest.raises(CheckpointError, match="there is no such folder"):
        open_model(tmp_path / "none", **OPTIONS)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is a checkpoint of a run"):
        open_model(tmp_path, **OPTIONS)


def test_weights_that_are_not_there_are_not_drawn(copied):
    weights = load_file(copied / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    rest = {key: value for key, value in weights.items() if key != name}
    save_file(rest, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"lacks weights that its config.json .*: {name}"):
        open_model(copied, **OPTIONS)


def test_damaged_folder(copied):
    (copied / "model.safetensors").write_bytes(b"none")
    with pytest.raises(CheckpointError, match="cannot be loaded as a model in Hugging Face's"):
        open_model(copied, **OPTIONS)


def test_no_such_device(export):
    with pytest.raises(UnavailableError, match=r"`device` \(abacus\) cannot be used"):
        open_model(export, **OPTIONS | {"device": "abacus"})
