"""Read a checkpoint's model in Hugging Face's form: tensors, configuration and tokenizer."""

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
    """Return the mapping of every tensor; check that they cover the checkpoint exactly.

    Raises:
        CheckpointError: a tensor is missing, has the wrong shape, is unknown, or is only partly
            used.
    """
    mappings, shapes = tensor_map.tensor_mappings(reader.config.model), reader.shapes
    problems = [
        f"`{key}` is missing"
        for key in dict.fromkeys(x.key for x in mappings if x.key not in shapes)
    ]
    problems += [f"`{key}` is unknown" for key in shapes if key not in {x.key for x in mappings}]
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
            f"Every tensor of a checkpoint must belong to its configuration's model, and all of it "
            f"must be used. {reader.path}: {'; '.join(list(dict.fromkeys(problems))[:8])}."
        )
    return mappings


def read_tensors(
    reader: CheckpointReader, mappings: Iterable[TensorMapping]
) -> Iterator[tuple[TensorMapping, Tensor]]:
    """Read one tensor after another; takes memory for two.

    Raises:
        CheckpointError: a file cannot be read, or a weight is not finite.
    """
    place: Any = None
    block = torch.empty(0)
    for mapping in mappings:
        if (mapping.key, mapping.index) != place:  # several tensors can be parts of one block
            place, block = (mapping.key, mapping.index), reader.read(mapping.key, mapping.index)
            check_finite(block, f"{reader.path}: `{mapping.key}`")
        yield mapping, mapping.read(block)


def check_finite(tensor: Tensor, name: str) -> None:
    """Check that all weights are finite.

    Raises:
        CheckpointError: some are infinite or NaN.
    """
    # Minimum and maximum, which are NaN if any value is: no temporary of the tensor's size.
    if not torch.stack(tensor.aminmax()).isfinite().all():
        raise CheckpointError(
            f"All weights must be finite; {name} has some that are not. The run diverged, or the "
            "file is damaged."
        )


def hf_config_of(
    reader: CheckpointReader, special: SpecialTokenIds, dtype: torch.dtype
) -> dict[str, Any]:
    """Return the content of ``config.json`` for a checkpoint's model."""
    return hf_config(
        reader.config.model,
        seq_length=reader.config.training.seq_length,
        dtype=str(dtype).removeprefix("torch."),
        bos=special.bos,
        eos=special.eos,
        pad=special.pad,
    )


def tokenizer_source(reader: CheckpointReader, given: str | None) -> str | None:
    """Return the path of a checkpoint's tokenizer; None is the built-in one.

    It is ``given``, else the one in the checkpoint, else the one that the run used.

    Raises:
        CheckpointError: it does not exist, has more ids than the model, or differs from the one
            that the run was trained with (only ``given`` may differ).
    """
    own, named = reader.path / "tokenizer", reader.config.data.tokenizer
    source = given or (str(own) if own.is_dir() else named)
    if source is not None and not Path(source).exists():
        raise CheckpointError(
            f"The checkpoint's tokenizer ({source}) does not exist here; give it with --tokenizer."
        )
    check_vocabulary(source, reader.config.model)
    if given is None and not is_trained_with(reader, source):
        raise CheckpointError(
            f"The tokenizer must be the one that the run was trained with; {source} has changed "
            "since. Give a copy of the original with --tokenizer."
        )
    return source


def is_trained_with(reader: CheckpointReader, source: str | None) -> bool:
    """Check whether a tokenizer is the run's, byte for byte; true if none is recorded."""
    data = reader.run.get("data")
    return data is None or data["tokenizer"] == load_tokenizer(source).fingerprint
