"""Write a checkpoint's tensors one at a time, without the model and without process groups."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, FileSystemWriter
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)


@dataclasses.dataclass(frozen=True)
class TensorBlock:
    """What is written at once: a tensor of the checkpoint at one layer, or layer and expert.

    Args:
        key: of the tensor.
        index: layer, or layer and expert; empty: the tensor has no such axes.
        axes: sizes of these axes.
        shape: of the block.
        make: returns the block when it is its turn.
    """

    key: str
    index: tuple[int, ...]
    axes: tuple[int, ...]
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    def num_bytes(self, dtype: torch.dtype) -> int:
        """Size in a file."""
        return torch.Size(self.shape).numel() * dtype.itemsize


def write_tensors(
    folder: Path, blocks: Sequence[TensorBlock], dtype: torch.dtype, advance: Callable[[int], None]
) -> None:
    """Write blocks in the form that the engine loads at any layout (``torch_dist``).

    Args:
        folder: of the checkpoint; exists.
        blocks: all of every tensor.
        dtype: of the file; blocks are converted.
        advance: called with the bytes of every block that is made.

    Raises:
        OSError: a file cannot be written (a full disk is torch's RuntimeError).
    """
    writer = FileSystemWriter(folder, single_file_per_rank=True, thread_count=1)
    planner = _Planner(blocks, dtype, advance)
    try:
        dcp.save({}, storage_writer=writer, planner=planner, no_dist=True)
    except CheckpointException as error:  # a list of what each rank raised
        ((cause, _),) = error.failures.values()
        raise cause from None
    # The engine's own files beside torch's (megatron/core/dist_checkpointing/core.py).
    backends = {"sharded_backend": "torch_dist", "common_backend": "torch"}
    versions = {"sharded_backend_version": 1, "common_backend_version": 1}
    (folder / "metadata.json").write_text(json.dumps(backends | versions))
    torch.save({}, folder / "common.pt")


class _Planner(DefaultSavePlanner):
    """Names the blocks first, and makes each when it is written."""

    def __init__(
        self, blocks: Sequence[TensorBlock], dtype: torch.dtype, advance: Callable[[int], None]
    ):
        super().__init__(flatten_state_dict=False)
        self.dtype, self.advance = dtype, advance
        self.blocks = {(block.key, _offsets(block)): block for block in blocks}

    def create_local_plan(self) -> SavePlan:
        """All blocks, in the order in which they were given."""
        numbers: dict[str, int] = {}
        items = []
        for (key, offsets), block in self.blocks.items():
            number = numbers[key] = numbers.get(key, -1) + 1
            items.append(_item(block, offsets, number, self.dtype))
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """The block that an item stands for."""
        assert write_item.tensor_data is not None
        block = self.blocks[write_item.index.fqn, write_item.tensor_data.chunk.offsets]
        tensor = block.make()
        assert tuple(tensor.shape) == block.shape, block
        self.advance(block.num_bytes(self.dtype))
        return tensor.to(self.dtype).reshape(write_item.tensor_data.chunk.sizes)


def _offsets(block: TensorBlock) -> torch.Size:
    return torch.Size((*block.index, *(0 for _ in block.shape)))


def _item(block: TensorBlock, offsets: torch.Size, number: int, dtype: torch.dtype) -> WriteItem:
    sizes = torch.Size((*(1 for _ in block.index), *block.shape))
    return WriteItem(
        index=MetadataIndex(block.key, offsets, number),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=offsets, sizes=sizes),
            properties=TensorProperties(dtype=dtype),
            size=torch.Size((*block.axes, *block.shape)),
        ),
    )
