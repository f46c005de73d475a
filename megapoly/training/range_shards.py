"""The shards of a range of a flattened parameter, in the parameter's own shape.

The distributed optimizer gives each data-parallel rank a range of every bucket of parameters, so a
rank may hold elements ``[start, end)`` of a flattened matrix. The engine stores such a range as it
is (``ShardedTensor.flattened_range``) no longer, and otherwise gathers whole parameters on every
rank (optimizer/distrib_optimizer.py, ``sharded_param_state_fully_reshardable``). A range in
row-major order is a few boxes: the end of a row, whole rows, the beginning of a row. A checkpoint
stores boxes of any size and reads them at any layout, so each rank writes its own elements and
gathers nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from megapoly.model.shards import shards_of


def range_shards(
    entry: ShardedTensor | ShardedTensorFactory, start: int, values: Tensor, prefix: str
) -> list[ShardedTensor]:
    """Return the shards of a tensor that belongs to a range of a parameter.

    Args:
        entry: of the whole parameter, which it holds.
        start: first element of the flattened parameter.
        values: [elements of the range], such as a moment. The shards are views of it and, in their
            order, all of it.
        prefix: of the shards' names, before the parameter's name.

    Raises:
        ValueError: the parameter is not stored in the order of its elements.
    """
    end, shards = start + values.numel(), []
    for part in shards_of(entry):
        assert part.data is not None and entry.data is not None, "entries hold their parameters"
        if not part.data.is_contiguous():
            raise ValueError(f"{part.key}: parts of a parameter must be contiguous")
        begin = part.data.storage_offset() - entry.data.storage_offset()
        first, last = max(start, begin), min(end, begin + part.data.numel())
        at = first - start
        for offset, shape in boxes(part.local_shape, first - begin, last - begin):
            length = math.prod(shape)
            shards.append(_box_of(part, offset, shape, values[at : at + length], prefix))
            at += length
    return shards


def boxes(
    shape: tuple[int, ...], start: int, end: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield offset and shape of the boxes that are elements ``[start, end)`` in row-major order."""
    if start >= end:
        return
    if len(shape) == 1:
        yield (start,), (end - start,)
        return
    row = math.prod(shape[1:])
    first_whole, last_whole = -(-start // row), end // row
    if first_whole > last_whole:  # both ends are in one row
        yield from _in_row(shape, last_whole, start, end)
        return
    yield from _in_row(shape, first_whole - 1, start, first_whole * row)
    if first_whole < last_whole:
        rest = (0,) * (len(shape) - 1)
        yield (first_whole, *rest), (last_whole - first_whole, *shape[1:])
    yield from _in_row(shape, last_whole, last_whole * row, end)


def _in_row(
    shape: tuple[int, ...], index: int, start: int, end: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    before = index * math.prod(shape[1:])
    for offset, size in boxes(shape[1:], start - before, end - before):
        yield (index, *offset), (1, *size)


def _box_of(
    part: ShardedTensor,
    offset: tuple[int, ...],
    shape: tuple[int, ...],
    values: Tensor,
    prefix: str,
) -> ShardedTensor:
    # Prepended axes (layer, expert) have length 1; boxes have no regular grid.
    shape = (1,) * part.prepend_axis_num + shape
    offset = (0,) * part.prepend_axis_num + offset
    stage, tensor_rank, _ = part.replica_id
    return ShardedTensor(
        key=f"{prefix}{part.key}",
        data=values.view(shape),
        dtype=values.dtype,
        local_shape=shape,
        global_shape=part.global_shape,
        global_offset=tuple(a + b for a, b in zip(part.global_offset, offset, strict=True)),
        axis_fragmentations=None,
        # Other data-parallel ranks have other elements, not replicas of these.
        replica_id=(stage, tensor_rank, 0),
        allow_shape_mismatch=part.allow_shape_mismatch,
    )
