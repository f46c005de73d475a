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
from megapoly.conversion.tensor_map import TensorMapping
from megapoly.conversion.tokenizer_files import SpecialTokenIds, check_vocabulary
from megapoly.data.tokenizer import load_tokenizer
from megapoly.errors import CheckpointError


def checked_mappings(reader: CheckpointReader) -> list[TensorMapping]:
    """The tensors of the checkpoint's model, each with its place, all of the checkpoint used.

    Raises:
        CheckpointError: a tensor is missing, has another shape, is not known, or is used in part.
    """
    mappings, shapes = tensor_map.tensor_mappings(reader.config.model), reader.shapes
    problems = [
        f"`{key}` is missing"
        for key in dict.fromkeys(x.key for x in mappings if x.key not in shapes)
    ]
    problems += [f"`{key}` is not known" for key in shapes if key not in {x.key for x in mappings}]
    used: dict[str, int] = {}
    for mapping in mappings:
        shape = shapes.get(mapping.key, ())
        used[mapping.key] = used.get(mapping.key, 0) + mapping.num_elements
        block = shape[len(mapping.index) :]
        fits = block == mapping.block
        if mapping.padded and len(block) == 2:
            fits = block[0] >= mapping.block[0] and block[1:] == mapping.block[1:]
            used[mapping.key] += (block[0] - mapping.block[0]) * block[1]
        if mapping.key in shapes and not fits:
            problems.append(
                f"`{mapping.key}` is {shape}, with {mapping.block} expected for `{mapping.name}`"
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
    return mappings


def read_tensors(
    reader: CheckpointReader, mappings: Iterable[TensorMapping]
) -> Iterator[tuple[TensorMapping, Tensor]]:
    """Read one tensor after another; memory for two.

    Raises:
        CheckpointError: a file cannot be read, or a weight is not finite.
    """
    place: Any = None
    block = torch.empty(0)
    for mapping in mappings:
        if (mapping.key, mapping.index) != place:  # several are parts of one
            place, block = (mapping.key, mapping.index), reader.read(mapping.key, mapping.index)
            check_finite(block, f"{reader.path}: `{mapping.key}`")
        yield mapping, mapping.read(block)


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


def describe(
    reader: CheckpointReader, special: SpecialTokenIds, dtype: torch.dtype
) -> dict[str, Any]:
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
