"""A small checkpoint with every kind of file, made without a job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemWriter

from megapoly.checkpoints.seal import seal
from megapoly.config import Config, to_yaml

RUN = {"iteration": 6, "layout": {"tensor": 2}, "data": {"weight": 0.1, "text": "é"}}


def tensors() -> dict[str, Any]:
    """Return tensors of several dtypes and sizes, none included, and an object."""
    generator = torch.Generator().manual_seed(1)
    return {
        "long": torch.randn(300, 100, generator=generator),
        "optimizer.long": torch.randn(300, 100, generator=generator).bfloat16(),
        "short": torch.arange(5),
        "zeros": torch.zeros(4096, dtype=torch.uint8),
        "empty": torch.empty(0, 3),
        "random_state": {"numpy": np.random.RandomState(1).get_state(), "words": (3, (1, 2), None)},
    }


def make_checkpoint(folder: Path) -> Path:
    """Write a sealed checkpoint; ``folder`` must not exist."""
    folder.mkdir(parents=True)
    write_tensors(folder, tensors())
    torch.save({"step": 3}, folder / "common.pt")
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    (folder / "config.yaml").write_text(to_yaml(Config()))
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer/tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}}))
    seal(folder, RUN)
    return folder


def write_tensors(folder: Path, content: dict[str, Any]) -> None:
    """Write the ``.distcp`` files and ``.metadata`` of a checkpoint."""
    writer = FileSystemWriter(folder, thread_count=2)
    dcp.save(content, storage_writer=writer, no_dist=True)
