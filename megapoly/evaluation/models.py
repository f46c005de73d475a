"""Open what is to be evaluated."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from megapoly.errors import CheckpointError, UnavailableError

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from lm_eval.models.huggingface import HFLM

DTYPES = ("auto", "float32", "bfloat16", "float16")


def open_model(path: Path, *, dtype: str, device: str, batch_size: int) -> LM:
    """Return the model in a folder, for the harness.

    Args:
        path: a folder in Hugging Face's format.
        dtype: one of ``DTYPES``; ``auto`` is the one it is stored in.
        device: as torch names it.
        batch_size: sequences at a time.

    Raises:
        CheckpointError: the folder holds no model, or not a whole one.
        UnavailableError: there is no such device, or a library is missing.
    """
    if (path / "config.json").is_file():
        return load_export(path, dtype=dtype, device=device, batch_size=batch_size)
    if (path / "run.json").is_file():
        raise CheckpointError(
            f"`{path}` is a checkpoint of a run; evaluate the model exported from it to Hugging "
            "Face's format"
        )
    raise CheckpointError(
        f"`{path}` is no model: a folder in Hugging Face's format has a config.json"
        + ("" if path.is_dir() else "; there is no such folder")
    )


def load_export(path: Path, *, dtype: str, device: str, batch_size: int) -> HFLM:
    """Return the causal language model and tokenizer in a folder; nothing is downloaded.

    Code in the folder is executed (``trust_remote_code``). Log-probabilities are computed in fp32
    whatever the model's dtype: in bf16 they differ by as much as close answers do.

    Args:
        path: folder with config.json, weights and tokenizer.
        dtype: one of ``DTYPES``.
        device: as torch names it.
        batch_size: sequences at a time.

    Raises:
        CheckpointError: a file is missing or damaged, or the weights are not those of the model.
        UnavailableError: there is no such device, or a library is missing.
    """
    try:
        from lm_eval.models.huggingface import HFLM
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise UnavailableError(
            f"a model in Hugging Face's format needs transformers and accelerate ({error}): "
            "pip install 'megapoly[eval]'"
        ) from error
    _check_device(device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, trust_remote_code=True, local_files_only=True
        )
        model, loading = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            trust_remote_code=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # of any kind: of the libraries, or of the folder's own code
        raise CheckpointError(
            f"`{path}` cannot be loaded as a model in Hugging Face's format: "
            f"{type(error).__name__}: {error}"
        ) from error
    _check_weights(path, loading)
    logger = logging.getLogger(HFLM.__module__)
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns that a model which is given is not loaded
    try:
        return HFLM(
            pretrained=model.to(device),
            tokenizer=tokenizer,
            batch_size=batch_size,
            softmax_dtype="float32",
        )
    finally:
        logger.setLevel(level)


def _check_device(device: str) -> None:
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise UnavailableError(f"`device` ({device}) cannot be used: {reason}") from error


def _check_weights(path: Path, loading: dict) -> None:
    """Transformers only warns, and draws at random what is missing."""
    for kind, what in (("missing_keys", "lacks"), ("mismatched_keys", "has in another shape")):
        keys = sorted(map(str, loading.get(kind) or ()))
        if keys:
            shown = ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
            raise CheckpointError(f"`{path}` {what} weights that its config.json asks for: {shown}")
