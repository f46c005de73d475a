"""Read the tensors of a checkpoint one at a time, without a model or process groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megapoly.checkpoints.choose import check_whole, is_checkpoint, newest_whole
from megapoly.checkpoints.run_file import DamageError, read_run_file
from megapoly.checkpoints.run_folder import checkpoint_names
from megapoly.checkpoints.tensor_reader import TensorReader
from megapoly.checkpoints.verify import ALONE, Ranks
from megapoly.config import Config, load_yaml
from megapoly.errors import CheckpointError

# A checkpoint also holds the optimizer's state, and states of random generators and of engine
# modules, which are not tensors.
_OPTIMIZER = "optimizer."


class CheckpointReader:
    """Reader of the model's tensors in ``RUN/checkpoints/iter_N``, saved at any parallel layout.

    Args:
        path: folder of the checkpoint.

    Raises:
        CheckpointError: ``path`` is not a complete checkpoint.
    """

    def __init__(self, path: Path):
        self.path = path
        self.config, self.run = read_description(path)
        self._reader = TensorReader(path)
        metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self._tensors = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not key.startswith(_OPTIMIZER)
        }
        check_chunks(path, self._tensors)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of the model, including its axes of layers and experts."""
        return {key: tuple(entry.size) for key, entry in self._tensors.items()}

    def dtype(self, key: str) -> torch.dtype:
        """Return the dtype that a tensor is stored in."""
        return self._tensors[key].properties.dtype

    def read(self, key: str, index: tuple[int, ...]) -> Tensor:
        """Return the part of a tensor that belongs to one layer, or to one layer and expert.

        Args:
            key: name of the tensor.
            index: layer, or layer and expert; empty for the whole tensor.

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
            target: contiguous, of the same dtype; leading axes of length 1 may be left out.
                Elements beyond the stored tensor keep their value.
            key: name of the tensor.
            offset: index in every axis of the stored tensor.

        Raises:
            CheckpointError: the tensor does not exist, or a file is missing or cannot be read.
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
        except Exception as error:  # files, pickles and archives raise their own
            raise CheckpointError(f"{self.path}: `{key}` cannot be read: {error!r}") from error


class _IntoBlock(LoadPlanner):
    """Planner that reads into one tensor."""

    def __init__(self, block: Tensor):
        self.block = block

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing; the reader makes the plan."""

    def create_local_plan(self) -> LoadPlan:
        """Not called; the reader makes the plan."""
        raise AssertionError

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """Not called; the reader makes the plan."""
        raise AssertionError

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        """Not called; the reader makes the plan."""
        raise AssertionError

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        """Not called; only tensors are read."""
        raise AssertionError

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """Return the view that a piece of a stored tensor is read into."""
        place = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        return self.block[tuple(slice(start, start + length) for start, length in place)]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Do nothing; the tensor was read into its place."""


def read_description(path: Path) -> tuple[Config, dict[str, Any]]:
    """Return the resolved configuration and the content of ``run.json``.

    Raises:
        CheckpointError: ``path`` is not a complete checkpoint.
    """
    try:
        run = read_run_file(path)
        config = load_yaml(path / "config.yaml")
    except (DamageError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a complete checkpoint ({error}); give a run that has one, or the "
            "path of an `iter_*` folder, such as runs/NAME/checkpoints/iter_0000100."
        ) from error
    return config, run


def find_checkpoint(path: Path, ranks: Ranks = ALONE) -> Path | None:
    """Return ``path`` if it is a checkpoint, the newest whole one if it is a run, else None.

    The checkpoint is verified, once in a process. Collective if there are several ranks.

    Raises:
        CheckpointError: ``path`` is a damaged checkpoint, or a run with no other.
    """
    if is_checkpoint(path):
        check_whole(path, ranks)
        return path
    return newest_whole(path, ranks)


def checkpoint_of_model(path: Path, ranks: Ranks = ALONE) -> Path | None:
    """Return the checkpoint that a path names; None if it is a Hugging Face folder.

    Raises:
        CheckpointError: it is neither, or :func:`find_checkpoint` raises.
    """
    return find_checkpoint(path, ranks) if names_checkpoint(path) else None


def names_checkpoint(path: Path) -> bool:
    """Return whether a path is a checkpoint or a run, whole or not, and no Hugging Face folder.

    Raises:
        CheckpointError: it is neither.
    """
    if is_checkpoint(path) or any(map(is_checkpoint, checkpoint_names(path))):
        return True
    if not (path / "config.json").is_file():
        raise CheckpointError(
            f"`{path}` is not a model. Give a checkpoint (a complete `iter_*` folder has a "
            "run.json), a run with such a checkpoint, or a Hugging Face folder (it has a "
            "config.json)" + ("" if path.is_dir() else "; this folder does not exist") + "."
        )
    return False


def check_chunks(path: Path, tensors: dict[str, TensorStorageMetadata]) -> None:
    """Check that every element of every tensor is stored exactly once.

    Raises:
        CheckpointError: a part is missing, or stored twice.
    """
    for key, entry in tensors.items():
        stored = sum(chunk.sizes.numel() for chunk in entry.chunks)
        if stored != entry.size.numel():
            raise CheckpointError(
                f"{path}: the parts of `{key}` must have {entry.size.numel()} numbers in total; "
                f"{stored} are stored. The checkpoint was not written completely."
            )
