"""Load a model in transformers, from a checkpoint or a Hugging Face folder."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from megapoly.config.command_line import TRUST_CODE
from megapoly.conversion.checkpoint_model import (
    checked_mappings,
    hf_config_of,
    read_tensors,
    tokenizer_source,
    write_tokenizer_of,
)
from megapoly.conversion.checkpoint_reader import CheckpointReader, checkpoint_of_model
from megapoly.conversion.folder_code import check_code, note_on_code
from megapoly.conversion.safetensors_reader import read_json
from megapoly.conversion.transformers_classes import (
    class_without_remote_code,
    config_and_model_class,
)
from megapoly.conversion.transformers_tokenizer import open_in_transformers
from megapoly.errors import CheckpointError
from megapoly.platform import extras


def load_transformers_model(
    path: Path, *, dtype: torch.dtype | None = None, device: str = "cpu", run_code: bool = False
) -> tuple[Any, Any]:
    """Load a model and its tokenizer.

    Args:
        path: a checkpoint ``iter_*``, a run for its newest checkpoint, or a Hugging Face folder. A
            checkpoint is converted in memory.
        dtype: dtype to compute in; None keeps the stored one.
        device: device to load to.
        run_code: see :func:`model_from_folder`.

    Returns:
        A ``PreTrainedModel`` in evaluation mode and its tokenizer.

    Raises:
        CheckpointError: ``path`` is none of these, is incomplete, or needs code that is not run.
        UnavailableError: a library is missing.
    """
    extras.require("A Hugging Face model", "hf", extras.EXTRAS["hf"])
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    checkpoint = checkpoint_of_model(path)
    model, tokenizer = (
        model_from_folder(path, run_code=run_code)
        if checkpoint is None
        else model_from_checkpoint(checkpoint)
    )
    return model.to(device=device, dtype=dtype or model.dtype).eval(), tokenizer


def model_from_folder(folder: Path, *, dtype: str = "auto", run_code: bool) -> tuple[Any, Any]:
    """Load model and tokenizer of a Hugging Face folder; nothing is downloaded.

    Weights in pickled files are read without executing anything (``weights_only``).

    Args:
        folder: with a ``config.json``.
        dtype: dtype to load to by torch's name; ``auto`` is the stored one.
        run_code: run the code in the folder (``trust_remote_code``). Otherwise this package's
            classes open exports, and transformers' own open what they know.

    Raises:
        CheckpointError: transformers cannot open it, weights are missing, or it needs code and
            ``run_code`` is false.
    """
    from transformers import AutoModelForCausalLM

    if run_code:
        opener = AutoModelForCausalLM
    else:
        check_code(folder)
        opener = class_without_remote_code(read_json(folder / "config.json"))
    try:
        model, loading = opener.from_pretrained(
            folder,
            dtype=dtype,
            # Not None, with which transformers asks on the terminal.
            trust_remote_code=run_code,
            local_files_only=True,
            weights_only=True,
            output_loading_info=True,
        )
        tokenizer = open_in_transformers(folder, run_code=run_code)
    except Exception as error:  # files, weights and the folder's own code raise their own
        note = None if run_code else note_on_code(folder)
        raise CheckpointError(
            f"`{folder}` cannot be opened as a model in Hugging Face's format: "
            f"{type(error).__name__}: {error}"
            + (f" Note: {note}; `{TRUST_CODE}` runs the code." if note else "")
        ) from error
    _check_weights(folder, loading)
    return model, tokenizer


def _check_weights(folder: Path, loading: dict[str, Any]) -> None:
    """Refuse missing weights, which transformers initialises at random with a mere warning."""
    for kind, problem in (("missing_keys", "lacks"), ("mismatched_keys", "has in another shape")):
        keys = sorted(map(str, loading.get(kind) or ()))
        if keys:
            shown = ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
            raise CheckpointError(
                f"`{folder}` {problem} weights that its config.json implies: {shown}"
            )


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
