"""Write a checkpoint as a Hugging Face folder, tensor by tensor."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from megapoly.errors import CheckpointError
from megapoly.huggingface import parity, tensor_map
from megapoly.huggingface.architecture import CODE_FILES, hf_config
from megapoly.huggingface.checkpoint_reader import CheckpointReader, find_checkpoint
from megapoly.huggingface.model_card import model_card
from megapoly.huggingface.output_folder import output_folder
from megapoly.huggingface.progress import bytes_bar
from megapoly.huggingface.safetensors_files import plan_shards, write_shards
from megapoly.huggingface.tensor_map import Link
from megapoly.huggingface.tokenizer_files import SpecialIds, write_tokenizer

_REMOTE_CODE = Path(__file__).parent / "remote_code"


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """What ``tools/convert_to_hf.py`` is asked for.

    Args:
        checkpoint: an ``iter_*`` folder, or a run, whose newest is taken.
        output: folder to make.
        dtype: of the weights; None: as they are stored.
        max_shard_size: bytes of one safetensors file.
        tokenizer: a ``tokenizer.json`` or folder, in place of the one that the run names.
        overwrite: replace ``output`` if it exists.
        skip_parity: do not compare the written model with the checkpoint's.
        tolerance: of the comparison, see :class:`megapoly.huggingface.parity.Parity`.
    """

    checkpoint: Path
    output: Path
    dtype: torch.dtype | None = None
    max_shard_size: int = 5_000_000_000
    tokenizer: str | None = None
    overwrite: bool = False
    skip_parity: bool = False
    tolerance: float = parity.TOLERANCE


def export(options: ExportOptions, console: Console) -> parity.Parity | None:
    """Convert a checkpoint and prove that the result is the same model.

    Everything is written to a hidden folder beside ``output``, which is renamed when all of it is
    there and the comparison has passed.

    Returns:
        The comparison; None where it was skipped.

    Raises:
        CheckpointError: the checkpoint is not complete or not of its configuration's model, or
            ``output`` exists.
        DataError: the tokenizer cannot be read, or the disk is full.
        ParityError: the written model is not the checkpoint's. What was written is kept in
            ``OUTPUT.failed``.
    """
    with output_folder(options.output, overwrite=options.overwrite) as folder:
        return _write(options, folder, console)


def _write(options: ExportOptions, folder: Path, console: Console) -> parity.Parity | None:
    checkpoint = find_checkpoint(options.checkpoint) or options.checkpoint
    reader = CheckpointReader(checkpoint)
    links = checked_links(reader)
    dtype = options.dtype or reader.dtype(links[0].key)
    special = write_tokenizer(
        tokenizer_source(reader, options.tokenizer),
        folder,
        seq_length=reader.config.training.seq_length,
    )
    config = describe(reader, special, dtype)
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", generation_config(special))
    if config["model_type"] == "megapoly":
        for name in CODE_FILES:
            shutil.copyfile(_REMOTE_CODE / name, folder / name)
    write_weights(reader, links, folder, dtype, options.max_shard_size, console)
    result = None
    if not options.skip_parity:
        result = parity.compare(checkpoint, folder, dtype, options.tolerance, console)
        _write_json(folder / "parity.json", result.to_dict())
    else:
        _write_json(folder / "parity.json", {"skipped": True})
    (folder / "README.md").write_text(model_card(reader, config, result), encoding="utf-8")
    if result is not None:
        result.raise_if_different()
    return result


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
    """Read one tensor after another; memory for two."""
    place: Any = None
    block = torch.empty(0)
    for link in links:
        if (link.key, link.index) != place:  # several are parts of one
            place, block = (link.key, link.index), reader.read(link.key, link.index)
        yield link, link.read(block)


def write_weights(
    reader: CheckpointReader,
    links: list[Link],
    folder: Path,
    dtype: torch.dtype,
    max_shard_size: int,
    console: Console,
) -> None:
    """Write all tensors as safetensors."""
    shards = plan_shards({link.name: link.shape for link in links}, dtype, max_shard_size)
    total = sum(link.num_elements for link in links) * dtype.itemsize
    with bytes_bar("writing weights", total, console) as advance:

        def named() -> Iterator[tuple[str, Tensor]]:
            for link, tensor in tensors_of(reader, links):
                yield link.name, tensor
                advance(link.num_elements * dtype.itemsize)

        write_shards(folder, shards, dtype, named())


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


def generation_config(special: SpecialIds) -> Mapping[str, Any]:
    """``generation_config.json``: greedy unless asked otherwise, up to the end of a document."""
    return {
        "bos_token_id": special.bos,
        "eos_token_id": special.eos,
        "pad_token_id": special.eos if special.pad is None else special.pad,
    }


def tokenizer_source(reader: CheckpointReader, given: str | None) -> str | None:
    """Where a checkpoint's tokenizer is: given, in the checkpoint, or where its run found it.

    Raises:
        CheckpointError: it is not there any more.
    """
    own, named = reader.path / "tokenizer", reader.config.data.tokenizer
    source = given or (str(own) if own.is_dir() else named)
    if source is not None and not Path(source).exists():
        raise CheckpointError(
            f"The checkpoint's tokenizer ({source}) does not exist here; name it with --tokenizer."
        )
    return source


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
