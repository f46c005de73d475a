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
from megapoly.conversion.generation import TextSettings, text_settings
from megapoly.conversion.imported_settings import ImportedSettings, load_settings
from megapoly.conversion.tensor_map import TensorMapping
from megapoly.conversion.tokenizer_files import check_vocabulary, write_tokenizer
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
    reader: CheckpointReader, settings: TextSettings, dtype: torch.dtype
) -> dict[str, Any]:
    """Return the content of ``config.json`` for a checkpoint's model."""
    return hf_config(
        reader.config.model,
        seq_length=reader.config.training.seq_length,
        dtype=str(dtype).removeprefix("torch."),
        bos=settings.bos,
        eos=settings.eos,
        pad=settings.pad,
    )


def imported_settings(
    reader: CheckpointReader, source: str | None
) -> tuple[ImportedSettings | None, list[str]]:
    """Return the settings of the model that a checkpoint was imported from, or goes on from.

    Args:
        reader: reader of the checkpoint.
        source: the export's tokenizer. Ids of the imported model hold only if it is the same.

    Returns:
        The settings, None if the model was not imported or the folder with them is not here; and
        notes on what is not used.

    Raises:
        CheckpointError: their file is damaged.
    """
    folder = _own_tokenizer(reader)
    if folder is None:
        return None, []
    if not folder.exists():
        note = "if the model was imported, the settings of its source are not exported"
        return None, [f"the tokenizer of the run, {folder}, does not exist here; {note}"]
    settings = load_settings(folder if folder.is_dir() else folder.parent)
    if settings is None or load_tokenizer(source).fingerprint == load_tokenizer(folder).fingerprint:
        return settings, []
    return settings.without_token_ids(), [
        f"token ids of the imported model are not exported: {source} is another tokenizer"
    ]


def write_tokenizer_of(
    reader: CheckpointReader, source: str | None, folder: Path
) -> tuple[TextSettings, ImportedSettings | None]:
    """Write the tokenizer files of a model; return its settings and those of its source.

    Args:
        reader: reader of the model's checkpoint.
        source: from :func:`tokenizer_source`.
        folder: folder to write to.
    """
    imported, notes = imported_settings(reader, source)
    config = reader.config
    length = config.model.max_position_embeddings or config.training.seq_length
    special = write_tokenizer(
        source,
        folder,
        max_length=length if imported is None else imported.tokenizer_length(length),
        pad=None if imported is None else imported.token_ids.get("pad_token_id"),
        add_bos=bool(reader.run.get("add_bos")),
    )
    settings = text_settings(special, imported)
    settings.notes[:0] = notes
    return settings, imported


def tokenizer_source(reader: CheckpointReader, given: str | None) -> str | None:
    """Return the path of a checkpoint's tokenizer; None is the built-in one.

    It is ``given``, else the one in the checkpoint, else the one that the run used.

    Raises:
        CheckpointError: it does not exist, has more ids than the model, or differs from the one
            that the run was trained with (only ``given`` may differ).
    """
    own = _own_tokenizer(reader)
    source = given or (None if own is None else str(own))
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


def _own_tokenizer(reader: CheckpointReader) -> Path | None:
    """Return the path of the tokenizer in a checkpoint, else of the run's; None: the built-in."""
    own, named = reader.path / "tokenizer", reader.config.data.tokenizer
    if own.is_dir():
        return own
    return None if named is None else Path(named)


def is_trained_with(reader: CheckpointReader, source: str | None) -> bool:
    """Check whether a tokenizer is the run's, byte for byte; true if none is recorded."""
    data = reader.run.get("data")
    return data is None or data["tokenizer"] == load_tokenizer(source).fingerprint
