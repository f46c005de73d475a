"""Write the tensors of a checkpoint one at a time, without a model or process groups."""

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
    """Part of a checkpoint tensor that is written at once: one layer, or one layer and expert.

    Args:
        key: name of the tensor.
        index: layer, or layer and expert; empty if the tensor has no such axes.
        axes: sizes of these axes.
        shape: shape of the block.
        make: returns the block; called when it is written.
    """

    key: str
    index: tuple[int, ...]
    axes: tuple[int, ...]
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    def num_bytes(self, dtype: torch.dtype) -> int:
        """Return the size of the block in a file."""
        return torch.Size(self.shape).numel() * dtype.itemsize


def write_tensors(
    folder: Path, blocks: Sequence[TensorBlock], dtype: torch.dtype, advance: Callable[[int], None]
) -> None:
    """Write blocks in the format that the engine loads at any layout (``torch_dist``).

    Args:
        folder: folder of the checkpoint, which exists.
        blocks: all blocks of every tensor.
        dtype: dtype in the file; blocks are converted to it.
        advance: called with the bytes of each block when it is written.

    Raises:
        OSError: a file cannot be written (torch raises RuntimeError if the disk is full).
    """
    writer = FileSystemWriter(folder, single_file_per_rank=True, thread_count=1)
    planner = _Planner(blocks, dtype, advance)
    try:
        dcp.save({}, storage_writer=writer, planner=planner, no_dist=True)
    except CheckpointException as error:  # a list of what each rank raised
        ((cause, _),) = error.failures.values()
        raise cause from None
    # The engine also needs its own files (megatron/core/dist_checkpointing/core.py).
    backends = {"sharded_backend": "torch_dist", "common_backend": "torch"}
    versions = {"sharded_backend_version": 1, "common_backend_version": 1}
    (folder / "metadata.json").write_text(json.dumps(backends | versions))
    torch.save({}, folder / "common.pt")


class _Planner(DefaultSavePlanner):
    """Planner that lists the blocks first, and makes each only when it is written."""

    def __init__(
        self, blocks: Sequence[TensorBlock], dtype: torch.dtype, advance: Callable[[int], None]
    ):
        super().__init__(flatten_state_dict=False)
        self.dtype, self.advance = dtype, advance
        self.blocks = {(block.key, _offsets(block)): block for block in blocks}

    def create_local_plan(self) -> SavePlan:
        """Plan all blocks, in the given order."""
        numbers: dict[str, int] = {}
        items = []
        for (key, offsets), block in self.blocks.items():
            number = numbers[key] = numbers.get(key, -1) + 1
            items.append(_item(block, offsets, number, self.dtype))
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """Make the block of an item."""
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
