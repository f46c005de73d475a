"""Write safetensors shards tensor by tensor, with memory for one tensor instead of one shard.

The safetensors library needs all tensors of a file in memory. The format is a header of known
length (names, dtypes, shapes, offsets) followed by the bytes in the same order, so a file can be
written tensor by tensor if the shapes are known (https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
SINGLE_NAME, INDEX_NAME = "model.safetensors", "model.safetensors.index.json"
# The library aligns the header for readers that map the file.
_ALIGNMENT = 8


@dataclasses.dataclass(frozen=True)
class SafetensorsShard:
    """One file.

    Args:
        name: name of the file.
        tensors: shapes by tensor name, in the order of writing.
    """

    name: str
    tensors: dict[str, tuple[int, ...]]


def plan_shards(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, max_shard_size: int
) -> list[SafetensorsShard]:
    """Split the tensors, in their order, into files of at most ``max_shard_size`` bytes.

    A larger tensor gets its own file. A single file is named ``model.safetensors``.
    """
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes.items():
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        if groups[-1] and size + num_bytes > max_shard_size:
            groups.append({})
            size = 0
        groups[-1][name] = shape
        size += num_bytes
    if len(groups) == 1:
        return [SafetensorsShard(SINGLE_NAME, groups[0])]
    names = (f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1))
    return [SafetensorsShard(name, group) for name, group in zip(names, groups, strict=True)]


def write_shards(
    folder: Path,
    shards: Sequence[SafetensorsShard],
    dtype: torch.dtype,
    tensors: Iterator[tuple[str, Tensor]],
) -> None:
    """Write all shards, and their index if there are several.

    Args:
        folder: existing folder.
        shards: result of :func:`plan_shards`.
        dtype: dtype in the files; tensors are rounded to it.
        tensors: names and tensors, in the order of the shards.
    """
    for shard in shards:
        with (folder / shard.name).open("wb") as stream:
            stream.write(_header(shard, dtype))
            for expected, shape in shard.tensors.items():
                name, tensor = next(tensors)
                assert (name, tuple(tensor.shape)) == (expected, shape), (name, expected)
                flat = tensor.to(dtype).contiguous().flatten()
                stream.write(flat.view(torch.uint8).numpy().data)
    left = next(tensors, None)
    assert left is None, left
    if len(shards) > 1:
        (folder / INDEX_NAME).write_text(_index(shards, dtype))


def _header(shard: SafetensorsShard, dtype: torch.dtype) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shard.tensors.items():
        end = offset + torch.Size(shape).numel() * dtype.itemsize
        entries[name] = {
            "dtype": DTYPES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _index(shards: Iterable[SafetensorsShard], dtype: torch.dtype) -> str:
    sizes = [torch.Size(shape).numel() for shard in shards for shape in shard.tensors.values()]
    index = {
        "metadata": {"total_size": sum(sizes) * dtype.itemsize},
        "weight_map": {name: shard.name for shard in shards for name in shard.tensors},
    }
    return json.dumps(index, indent=2) + "\n"
