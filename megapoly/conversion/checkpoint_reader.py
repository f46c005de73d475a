"""Read tensors of a checkpoint one at a time, without the model and without process groups."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megapoly.config import Config, load_yaml
from megapoly.errors import CheckpointError

# What a checkpoint holds beside the model: the optimizer's state, and states of random generators
# and engine modules, which are no tensors.
_OPTIMIZER = "optimizer."


class CheckpointReader:
    """The model's tensors in ``RUN/checkpoints/iter_N``, of any parallel layout.

    Args:
        path: the checkpoint's folder.

    Raises:
        CheckpointError: it is not a complete checkpoint.
    """

    def __init__(self, path: Path):
        self.path = path
        self.config, self.run = read_description(path)
        self._reader = FileSystemReader(path)
        try:
            metadata = self._reader.read_metadata()
        except Exception as error:  # whatever a damaged pickle leads to
            raise CheckpointError(f"{path} has no tensors that can be read: {error!r}") from error
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self._tensors = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not key.startswith(_OPTIMIZER)
        }
        check_chunks(path, self._tensors)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of the model, with its axes of layers and experts."""
        return {key: tuple(entry.size) for key, entry in self._tensors.items()}

    def dtype(self, key: str) -> torch.dtype:
        """Dtype that a tensor is stored in."""
        return self._tensors[key].properties.dtype

    def read(self, key: str, index: tuple[int, ...]) -> Tensor:
        """The tensor ``key`` at a layer, or a layer and expert: the axes behind these.

        Raises:
            CheckpointError: a file is missing, or cannot be read.
        """
        rest = tuple(self._tensors[key].size)[len(index) :]
        block = torch.empty(rest, dtype=self.dtype(key))
        self.read_into(block, key, index + (0,) * len(rest))
        return block

    def read_into(self, target: Tensor, key: str, offset: tuple[int, ...]) -> None:
        """Fill ``target`` with the part of ``key`` that begins at ``offset``.

        Args:
            target: of the same dtype, contiguous; it may lack leading axes of length 1. What lies
                beyond the stored tensor is left as it is.
            key: of the tensor.
            offset: in all axes of the stored tensor.

        Raises:
            CheckpointError: there is no such tensor, or a file is missing, or cannot be read.
        """
        if key not in self._tensors:
            raise CheckpointError(f"{self.path} has no tensor `{key}`, which its model needs.")
        entry = self._tensors[key]
        target = target.view((1,) * (len(offset) - target.dim()) + tuple(target.shape))
        inside = zip(offset, target.shape, entry.size, strict=True)
        sizes = torch.Size(min(length, size - start) for start, length, size in inside)
        wanted = ChunkStorageMetadata(offsets=torch.Size(offset), sizes=sizes)
        items = create_read_items_for_chunk_list(key, entry, [wanted])
        try:
            self._reader.read_data(LoadPlan(items), _IntoBlock(target)).wait()
        except Exception as error:  # of files, pickles and archives alike
            raise CheckpointError(f"{self.path}: `{key}` cannot be read: {error!r}") from error


class _IntoBlock(LoadPlanner):
    """Puts what is read into one tensor."""

    def __init__(self, block: Tensor):
        self.block = block

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is to be planned."""

    def create_local_plan(self) -> LoadPlan:
        """The plan is made by the reader."""
        raise AssertionError

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """The plan is made by the reader."""
        raise AssertionError

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        """The plan is made by the reader."""
        raise AssertionError

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        """There are only tensors."""
        raise AssertionError

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """Where a piece of a stored tensor goes."""
        place = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        return self.block[tuple(slice(start, start + length) for start, length in place)]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """It is in its place already."""


def read_description(path: Path) -> tuple[Config, dict[str, Any]]:
    """Resolved configuration and ``run.json`` of a checkpoint.

    Raises:
        CheckpointError: it is not a complete checkpoint.
    """
    try:
        run = json.loads((path / "run.json").read_text())
        config = load_yaml(path / "config.yaml")
        if not isinstance(run, dict):
            raise ValueError("run.json is no object")
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a complete checkpoint ({error}); give the path of an `iter_*` folder, "
            "such as runs/NAME/checkpoints/iter_0000100."
        ) from error
    return config, run


def find_checkpoint(path: Path) -> Path | None:
    """The checkpoint that a path names: itself, or the newest of a run; None: neither."""
    if (path / "run.json").is_file():
        return path
    found = sorted((path / "checkpoints").glob("iter_*/run.json"))
    return found[-1].parent if found else None


def check_chunks(path: Path, tensors: dict[str, TensorStorageMetadata]) -> None:
    """Every number of every tensor is stored exactly once.

    Raises:
        CheckpointError: a part is missing, or there twice.
    """
    for key, entry in tensors.items():
        stored = sum(chunk.sizes.numel() for chunk in entry.chunks)
        if stored != entry.size.numel():
            raise CheckpointError(
                f"{path}: the parts of `{key}` must add up to {entry.size.numel()} numbers; "
                f"{stored} are there. The checkpoint was not written completely."
            )
