"""A model to use, from a checkpoint or a Hugging Face folder, by transformers."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from megapoly.errors import CheckpointError
from megapoly.huggingface.architecture import model_type
from megapoly.huggingface.checkpoint_reader import CheckpointReader, find_checkpoint
from megapoly.huggingface.export import checked_links, describe, tensors_of, tokenizer_source
from megapoly.huggingface.tokenizer_files import write_tokenizer


def open_model(
    path: Path, *, dtype: torch.dtype | None = None, device: str = "cpu"
) -> tuple[Any, Any]:
    """Model and tokenizer.

    Args:
        path: a checkpoint ``iter_*``, a run (its newest checkpoint), or a Hugging Face folder. A
            checkpoint is converted in memory.
        dtype: to compute in; None: as stored.
        device: where.

    Returns:
        A ``PreTrainedModel`` in evaluation mode and its tokenizer.

    Raises:
        CheckpointError: it is none of these, or not complete.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    checkpoint = find_checkpoint(path)
    if checkpoint is not None:
        model, tokenizer = from_checkpoint(checkpoint)
    elif (path / "config.json").is_file():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path, trust_remote_code=True, local_files_only=True, dtype=dtype or "auto"
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            path, trust_remote_code=True, local_files_only=True
        )
    else:
        raise CheckpointError(
            f"{path} must be a checkpoint (`iter_*`), a run with one, or a folder with a "
            "config.json."
        )
    return model.to(device=device, dtype=dtype or model.dtype).eval(), tokenizer


def from_checkpoint(checkpoint: Path) -> tuple[Any, Any]:
    """Model and tokenizer of a checkpoint, as an export of it would be opened."""
    from transformers import PreTrainedTokenizerFast

    reader = CheckpointReader(checkpoint)
    links = checked_links(reader)
    with tempfile.TemporaryDirectory(prefix="megapoly-tokenizer-") as folder:
        special = write_tokenizer(
            tokenizer_source(reader, None),
            Path(folder),
            seq_length=reader.config.training.seq_length,
        )
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    dtype = reader.dtype(links[0].key)
    fields = describe(reader, special, dtype)
    config_class, model_class = _CLASSES[model_type(reader.config.model)]()
    for name in ("model_type", "auto_map", "torch_dtype"):
        fields.pop(name, None)
    weights = {link.name: tensor for link, tensor in tensors_of(reader, links)}
    model = model_class.from_pretrained(
        None, config=config_class(**fields), state_dict=weights, dtype=dtype
    )
    return model, tokenizer


def _llama() -> tuple[Any, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaConfig, LlamaForCausalLM


def _olmoe() -> tuple[Any, Any]:
    from transformers import OlmoeConfig, OlmoeForCausalLM

    return OlmoeConfig, OlmoeForCausalLM


def _megapoly() -> tuple[Any, Any]:
    from megapoly.huggingface.remote_code.configuration_megapoly import MegapolyConfig
    from megapoly.huggingface.remote_code.modeling_megapoly import MegapolyForCausalLM

    return MegapolyConfig, MegapolyForCausalLM


_CLASSES = {"llama": _llama, "olmoe": _olmoe, "megapoly": _megapoly}
