"""Ranges of flattened tensors as boxes."""

import math

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megapoly.training.range_shards import boxes, range_shards

RANGES = [
    (shape, start, end)
    for shape in ((7,), (3, 5), (1, 4), (4, 1), (2, 3, 4))
    for start in range(math.prod(shape) + 1)
    for end in range(start, math.prod(shape) + 1)
]


def box_of(tensor, offset, shape):
    return tensor[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]


def test_boxes_have_the_elements_of_the_range_in_their_order():
    for shape, start, end in RANGES:
        flat = torch.arange(math.prod(shape))
        found = list(boxes(shape, start, end))
        pieces = [box_of(flat.view(shape), *each).flatten() for each in found]
        assert torch.equal(torch.cat([flat[:0], *pieces]), flat[start:end]), (shape, start, end)
        assert all(math.prod(size) for _, size in found)
        assert len(found) <= 2 * len(shape) - 1


def entry(parameter, *, layer, rank):
    """Return the entry of a matrix in layer ``layer`` of 3, of which ``rank`` of 2 has these rows."""
    return ShardedTensor.from_rank_offsets(
        "weight", parameter, (0, layer, 3), (1, rank, 2), replica_id=(0, 0, 5), prepend_axis_num=1
    )


def test_shards_of_all_ranges_are_the_whole_tensor():
    """Two tensor-parallel ranks with three data-parallel ranges each, of every layer."""
    whole = torch.randn(3, 8, 5)
    stored = torch.full_like(whole, float("nan"))
    for layer in range(3):
        for rank in range(2):
            values = whole[layer, 4 * rank : 4 * rank + 4].flatten()
            parameter = entry(torch.empty(4, 5), layer=layer, rank=rank)
            for start, end in ((0, 7), (7, 8), (8, 20)):
                for shard in range_shards(parameter, start, values[start:end], "exp_avg."):
                    assert shard.key == "exp_avg.weight" and shard.replica_id == (0, 0, 0)
                    assert shard.global_shape == (3, 8, 5) and not shard.has_regular_grid
                    place = box_of(stored, shard.global_offset, shard.local_shape)
                    assert place.isnan().all()
                    place.copy_(shard.data)
    assert torch.equal(stored, whole)


def test_shards_are_views_and_a_transposed_parameter_is_refused():
    values = torch.randn(11)
    shards = range_shards(entry(torch.empty(4, 5), layer=0, rank=0), 3, values, "")
    assert all(s.data.untyped_storage().data_ptr() == values.data_ptr() for s in shards)
    with pytest.raises(ValueError, match="must be contiguous"):
        range_shards(entry(torch.empty(5, 4).T, layer=0, rank=0), 3, values, "")
