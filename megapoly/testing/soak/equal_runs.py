"""Compare a run with one that met no fault: its metrics, and every tensor of a checkpoint."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex

from megapoly.checkpoints.tensor_metadata import read_metadata
from megapoly.checkpoints.tensor_reader import load_object

# Depend on the machine and on where a process began, not on what is trained.
_SPEED = ("step_time_s", "tokens_per_second", "tflops_per_device", "mfu", "peak_tflops")
_LEFT_OUT = {*_SPEED, "max_memory_allocated_bytes", "time"}
# The state of Python's and NumPy's generators differs between any two runs, and no step draws from
# them; dropout draws from torch's, and shows in the losses.
_RANDOM_STATE = "random_state/"
_COMMON = "common.pt"  # the engine's file of what is not sharded


def metrics_of(run_dir: Path) -> list[dict[str, Any]]:
    """Return the lines of ``metrics.jsonl`` without times; a line that is being written is none."""
    file = run_dir / "metrics.jsonl"
    if not file.exists():
        return []
    *lines, _ = file.read_text().split("\n")
    steps = map(json.loads, lines)
    return [{name: step[name] for name in step if name not in _LEFT_OUT} for step in steps]


def metrics_differ(
    found: list[dict[str, Any]], expected: list[dict[str, Any]], *, whole: bool = False
) -> str | None:
    """Return how the metrics of a run differ from those of the uninterrupted one; None if not.

    Args:
        found: of the run.
        expected: of the uninterrupted run.
        whole: whether the run is complete; else it may have fewer steps.
    """
    if len(found) > len(expected) or (whole and len(found) < len(expected)):
        return f"metrics.jsonl has {len(found)} steps instead of {len(expected)}"
    for number, (one, other) in enumerate(zip(found, expected, strict=False), start=1):
        if json.dumps(one) != json.dumps(other):  # NaN equals NaN in text
            names = sorted(one.keys() | other.keys())
            name = next(n for n in names if json.dumps(one.get(n)) != json.dumps(other.get(n)))
            values = f"{one.get(name)} instead of {other.get(name)}"
            return f"step {number} of metrics.jsonl: {name} is {values}"
    return None


def checkpoints_differ(found: Path, expected: Path) -> str | None:
    """Return how the contents of two checkpoints differ; None if every bit is equal.

    Args:
        found: an ``iter_*`` folder.
        expected: another, saved at the same layout.
    """
    one, other = _entries(found), _entries(expected)
    if one.keys() != other.keys():
        names = sorted(str(index.fqn) for index in one.keys() ^ other.keys())
        return f"{found.name}: entries that only one checkpoint has: {', '.join(names[:4])}"
    different = [
        index.fqn
        for index in one
        if not _equal(_read(found, *one[index]), _read(expected, *other[index]))
    ]
    if not _equal(*((each / _COMMON).read_bytes() for each in (found, expected))):
        different.append(_COMMON)
    if not different:
        return None
    shown = ", ".join(sorted(set(different))[:4])
    return f"{found.name}: {len(different)} of {len(one)} entries differ, such as {shown}"


def _entries(checkpoint: Path) -> dict[MetadataIndex, tuple[str, int, int]]:
    """Return the file, offset and length of every shard."""
    storage = read_metadata(checkpoint).storage_data
    # The hint of an index is a position in a list, not part of its identity.
    return {
        MetadataIndex(index.fqn, index.offset): (place.relative_path, place.offset, place.length)
        for index, place in storage.items()
        if not index.fqn.startswith(_RANDOM_STATE)
    }


def _read(checkpoint: Path, name: str, offset: int, length: int) -> bytes:
    with (checkpoint / name).open("rb") as stream:
        stream.seek(offset)
        return stream.read(length)


def _equal(one: bytes, other: bytes) -> bool:
    """Compare two archives of ``torch.save``; equal objects may be written in different ways."""
    if one == other:
        return True
    first, second = (load_object(io.BytesIO(each)) for each in (one, other))
    return list(_leaves(first)) == list(_leaves(second))


def _leaves(entry: Any) -> Iterator[Any]:
    """Yield the values of nested dictionaries and lists with their keys; tensors as bytes."""
    if isinstance(entry, dict):
        for key in sorted(entry, key=str):
            yield key
            yield from _leaves(entry[key])
    elif isinstance(entry, list | tuple):
        yield len(entry)
        for each in entry:
            yield from _leaves(each)
    elif isinstance(entry, Tensor):
        yield entry.dtype, tuple(entry.shape)
        yield entry.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    else:
        yield entry
