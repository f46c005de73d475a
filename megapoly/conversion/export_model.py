"""Export a checkpoint as a Hugging Face folder, tensor by tensor."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from megapoly.conversion.architecture import CODE_FILES, MODEL_TYPE
from megapoly.conversion.checkpoint_model import (
    checked_mappings,
    hf_config_of,
    is_trained_with,
    read_tensors,
    tokenizer_source,
    write_tokenizer_of,
)
from megapoly.conversion.checkpoint_reader import CheckpointReader, find_checkpoint
from megapoly.conversion.folder_code import PACKAGED_CODE
from megapoly.conversion.model_card import model_card
from megapoly.conversion.output_folder import output_folder, write_json
from megapoly.conversion.parity import TOLERANCE, Parity
from megapoly.conversion.parity_check import check_export_parity
from megapoly.conversion.safetensors_writer import plan_shards, write_shards
from megapoly.conversion.tensor_map import TensorMapping
from megapoly.platform import extras
from megapoly.platform.progress import bytes_bar


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """Options of ``megapoly export``.

    Args:
        checkpoint: an ``iter_*`` folder, or a run for its newest checkpoint.
        output: folder to create.
        dtype: dtype of the weights; None keeps the stored one.
        max_shard_size: largest size of a safetensors file, in bytes.
        tokenizer: a ``tokenizer.json`` or folder that replaces the run's tokenizer.
        overwrite: replace ``output`` if it exists.
        skip_parity: do not compare the written model with the checkpoint's.
        tolerance: tolerance of the comparison, see :class:`megapoly.conversion.parity.Parity`.
        card: ``license``, ``language`` and ``datasets`` of the model card; what is not given is
            taken from the model that was imported, if it was.
    """

    checkpoint: Path
    output: Path
    dtype: torch.dtype | None = None
    max_shard_size: int = 5_000_000_000
    tokenizer: str | None = None
    overwrite: bool = False
    skip_parity: bool = False
    tolerance: float = TOLERANCE
    card: dict[str, Any] = dataclasses.field(default_factory=dict)


def export_model(options: ExportOptions, console: Console) -> Parity | None:
    """Convert a checkpoint and prove that the result is the same model.

    Everything is written to a hidden folder next to ``output``, which is renamed when it is
    complete and the comparison has passed.

    Returns:
        The comparison; None if it was skipped.

    Raises:
        CheckpointError: the checkpoint is incomplete or does not fit its configuration, or
            ``output`` exists.
        UnavailableError: a library is missing.
        DataError: the tokenizer cannot be read, or the disk is full.
        ParityError: the written model is not the checkpoint's. The folder is kept as
            ``OUTPUT.failed``.
    """
    extras.require("A Hugging Face model", "hf", extras.EXTRAS["hf"])
    source = find_checkpoint(options.checkpoint) or options.checkpoint
    with output_folder(options.output, source=source, overwrite=options.overwrite) as folder:
        return _write(options, CheckpointReader(source), folder, console)


def _write(
    options: ExportOptions, reader: CheckpointReader, folder: Path, console: Console
) -> Parity | None:
    mappings = checked_mappings(reader)
    dtype = options.dtype or reader.dtype(mappings[0].key)
    source = tokenizer_source(reader, options.tokenizer)
    settings, imported = write_tokenizer_of(reader, source, folder)
    for note in settings.notes:
        console.print(f"note: {note}", soft_wrap=True)
    if options.tokenizer is not None and not is_trained_with(reader, source):
        console.print(f"note: {source} is not the file that the run's tokenizer was read from")
    config = hf_config_of(reader, settings, dtype)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", settings.generation)
    if config["model_type"] == MODEL_TYPE:
        for name in CODE_FILES:
            shutil.copyfile(PACKAGED_CODE / name, folder / name)
    write_weights(reader, mappings, folder, dtype, options.max_shard_size, console)
    result = None
    if not options.skip_parity:
        result = check_export_parity(reader.path, folder, dtype, options.tolerance, console)
    write_json(folder / "parity.json", {"skipped": True} if result is None else result.to_dict())
    known = {} if imported is None else imported.card
    card = model_card(reader, config, result, known | options.card)
    (folder / "README.md").write_text(card, encoding="utf-8")
    if result is not None:
        result.raise_if_different("parity.json")
    return result


def write_weights(
    reader: CheckpointReader,
    mappings: list[TensorMapping],
    folder: Path,
    dtype: torch.dtype,
    max_shard_size: int,
    console: Console,
) -> None:
    """Write all tensors as safetensors."""
    shards = plan_shards({each.name: each.shape for each in mappings}, dtype, max_shard_size)
    total = sum(each.num_elements for each in mappings) * dtype.itemsize
    with bytes_bar("writing weights", total, console) as advance:

        def named_tensors() -> Iterator[tuple[str, Tensor]]:
            for mapping, tensor in read_tensors(reader, mappings):
                yield mapping.name, tensor
                advance(mapping.num_elements * dtype.itemsize)

        write_shards(folder, shards, dtype, named_tensors())
