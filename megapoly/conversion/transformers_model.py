"""Load a model in transformers, from a checkpoint or a Hugging Face folder."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from megapoly.conversion.checkpoint_model import (
    checked_mappings,
    hf_config_of,
    read_tensors,
    tokenizer_source,
    write_tokenizer_of,
)
from megapoly.conversion.checkpoint_reader import CheckpointReader, checkpoint_of_model
from megapoly.conversion.safetensors_reader import read_json
from megapoly.conversion.transformers_classes import (
    class_without_remote_code,
    config_and_model_class,
)
from megapoly.conversion.transformers_tokenizer import open_in_transformers
from megapoly.errors import CheckpointError
from megapoly.platform import extras


def load_transformers_model(
    path: Path, *, dtype: torch.dtype | None = None, device: str = "cpu"
) -> tuple[Any, Any]:
    """Load a model and its tokenizer; code in a folder is not run.

    Args:
        path: a checkpoint ``iter_*``, a run for its newest checkpoint, or a Hugging Face folder. A
            checkpoint is converted in memory.
        dtype: dtype to compute in; None keeps the stored one.
        device: device to load to.

    Returns:
        A ``PreTrainedModel`` in evaluation mode and its tokenizer.

    Raises:
        CheckpointError: ``path`` is none of these, or is incomplete.
        UnavailableError: a library is missing.
    """
    extras.require("A Hugging Face model", "hf", extras.EXTRAS["hf"])
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    checkpoint = checkpoint_of_model(path)
    model, tokenizer = (
        model_from_folder(path) if checkpoint is None else model_from_checkpoint(checkpoint)
    )
    return model.to(device=device, dtype=dtype or model.dtype).eval(), tokenizer


def model_from_folder(folder: Path) -> tuple[Any, Any]:
    """Load model and tokenizer of a Hugging Face folder; exports by this package's classes.

    Raises:
        CheckpointError: transformers cannot open it.
    """
    opener = class_without_remote_code(read_json(folder / "config.json"))
    try:
        model = opener.from_pretrained(folder, local_files_only=True, dtype="auto")
        return model, open_in_transformers(folder, run_code=False)
    except Exception as error:  # files, configurations and weights raise their own
        raise CheckpointError(f"{folder} cannot be opened by transformers: {error}") from error


def model_from_checkpoint(checkpoint: Path) -> tuple[Any, Any]:
    """Convert a checkpoint in memory; return model and tokenizer as its export would open."""
    from transformers import GenerationConfig

    reader = CheckpointReader(checkpoint)
    mappings = checked_mappings(reader)
    with tempfile.TemporaryDirectory(prefix="megapoly-tokenizer-") as folder:
        settings, _ = write_tokenizer_of(reader, tokenizer_source(reader, None), Path(folder))
        tokenizer = open_in_transformers(Path(folder), run_code=False)
    dtype = reader.dtype(mappings[0].key)
    config, model_class = config_and_model_class(hf_config_of(reader, settings, dtype))
    weights = {mapping.name: tensor for mapping, tensor in read_tensors(reader, mappings)}
    model = model_class.from_pretrained(None, config=config, state_dict=weights, dtype=dtype)
    model.generation_config = GenerationConfig.from_dict(settings.generation)
    return model, tokenizer
