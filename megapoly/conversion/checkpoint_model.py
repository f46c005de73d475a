"""The model of a checkpoint in Hugging Face's form: its tensors, configuration and tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megapoly.conversion import tensor_map
from megapoly.conversion.architecture import hf_config
from megapoly.conversion.checkpoint_reader import CheckpointReader
from megapoly.conversion.tensor_map import Link
from megapoly.conversion.tokenizer_files import SpecialIds, check_vocabulary
from megapoly.data.tokenizer import load_tokenizer
from megapoly.errors import CheckpointError


def checked_links(reader: CheckpointReader) -> list[Link]:
    """The tensors of the checkpoint's model, each with its place, all of the checkpoint used.

    Raises:
        CheckpointError: a tensor is missing, has another shape, is not known, or is used in part.
    """
    links, shapes = tensor_map.links(reader.config.model), reader.shapes
    problems = [
        f"`{key}` is missing" for key in dict.fromkeys(x.key for x in links if x.key not in shapes)
    ]
    problems += [f"`{key}` is not known" for key in shapes if key not in {x.key for x in links}]
    used: dict[str, int] = {}
    for link in links:
        shape = shapes.get(link.key, ())
        used[link.key] = used.get(link.key, 0) + link.num_elements
        block = shape[len(link.index) :]
        fits = block == link.block
        if link.padded and len(block) == 2:
            fits = block[0] >= link.block[0] and block[1:] == link.block[1:]
            used[link.key] += (block[0] - link.block[0]) * block[1]
        if link.key in shapes and not fits:
            problems.append(
                f"`{link.key}` is {shape}, with {link.block} expected for `{link.name}`"
            )
    problems += [
        f"`{key}` has {torch.Size(shapes[key]).numel()} numbers, {count} are used"
        for key, count in used.items()
        if key in shapes and torch.Size(shapes[key]).numel() != count
    ]
    if problems:
        raise CheckpointError(
            f"Every tensor of a checkpoint must be one of its configuration's model, and be used "
            f"whole. {reader.path}: {'; '.join(list(dict.fromkeys(problems))[:8])}."
        )
    return links


def tensors_of(reader: CheckpointReader, links: Iterable[Link]) -> Iterator[tuple[Link, Tensor]]:
    """Read one tensor after another; memory for two.

    Raises:
        CheckpointError: a file cannot be read, or a weight is not finite.
    """
    place: Any = None
    block = torch.empty(0)
    for link in links:
        if (link.key, link.index) != place:  # several are parts of one
            place, block = (link.key, link.index), reader.read(link.key, link.index)
            check_finite(block, f"{reader.path}: `{link.key}`")
        yield link, link.read(block)


def check_finite(tensor: Tensor, name: str) -> None:
    """Refuse weights that are infinite or not a number.

    Raises:
        CheckpointError: there are some.
    """
    # Smallest and largest, which a NaN is where there is one: no temporary of the tensor's size.
    if not torch.stack(tensor.aminmax()).isfinite().all():
        raise CheckpointError(
            f"All weights must be finite; {name} has some that are not. The run had diverged, or "
            "the file is damaged."
        )


def describe(reader: CheckpointReader, special: SpecialIds, dtype: torch.dtype) -> dict[str, Any]:
    """``config.json`` of a checkpoint's model."""
    return hf_config(
        reader.config.model,
        seq_length=reader.config.training.seq_length,
        dtype=str(dtype).removeprefix("torch."),
        bos=special.bos,
        eos=special.eos,
        pad=special.pad,
    )


def tokenizer_source(reader: CheckpointReader, given: str | None) -> str | None:
    """Where a checkpoint's tokenizer is: given, in the checkpoint, or where its run found it.

    Raises:
        CheckpointError: it is not there any more, is not the one that the run was trained with (one
            that is given may be another file), or has more ids than the model.
    """
    own, named = reader.path / "tokenizer", reader.config.data.tokenizer
    source = given or (str(own) if own.is_dir() else named)
    if source is not None and not Path(source).exists():
        raise CheckpointError(
            f"The checkpoint's tokenizer ({source}) does not exist here; name it with --tokenizer."
        )
    check_vocabulary(source, reader.config.model)
    if given is None and not is_trained_with(reader, source):
        raise CheckpointError(
            f"The tokenizer must be the one that the run was trained with; {source} has changed "
            "since. Name a copy of what it was with --tokenizer."
        )
    return source


def is_trained_with(reader: CheckpointReader, source: str | None) -> bool:
    """Whether a tokenizer is, to the byte, that of the run; also where that is not recorded."""
    data = reader.run.get("data")
    return data is None or data["tokenizer"] == load_tokenizer(source).fingerprint
