"""Load the model that one process evaluates."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from megapoly.conversion.checkpoint_reader import checkpoint_of_model
from megapoly.conversion.transformers_tokenizer import open_in_transformers
from megapoly.errors import CheckpointError, UnavailableError

if TYPE_CHECKING:
    from megapoly.evaluation.transformers_lm import TransformersLM


def load_lm(
    path: Path, *, dtype: str, device: str, batch_size: int, add_bos: bool | None = None
) -> TransformersLM:
    """Load a model for the harness; nothing is downloaded.

    Code in a Hugging Face folder is executed (``trust_remote_code``).

    Args:
        path: a folder in Hugging Face's format, a checkpoint ``iter_*``, which is converted in
            memory, or a run, for its newest checkpoint.
        dtype: one of :data:`megapoly.evaluation.request.DTYPES`; ``auto`` is the stored one.
        device: device by torch's name.
        batch_size: sequences per forward pass.
        add_bos: see :class:`megapoly.evaluation.transformers_lm.TransformersLM`; None: as a
            checkpoint or an export records it (:mod:`megapoly.conversion.bos_rule`).

    Raises:
        CheckpointError: ``path`` is not a model, a file is missing or damaged, or the weights do
            not fit the model.
        EvaluationError: ``add_bos``, and the tokenizer puts nothing before a text.
        UnavailableError: the device cannot be used, or a library is missing.
    """
    try:
        from megapoly.evaluation.transformers_lm import TransformersLM
    except ImportError as error:
        raise UnavailableError(
            f"Tasks need the LM Evaluation Harness, transformers and accelerate ({error}): "
            "pip install 'megapoly[eval]'"
        ) from error
    import torch

    from megapoly.conversion.bos_rule import bos_rule, is_export
    from megapoly.conversion.transformers_model import model_from_checkpoint
    from megapoly.platform.device import check_device

    checkpoint = checkpoint_of_model(path)
    check_device("device", device)
    if checkpoint is None:
        model, tokenizer = _load_folder(path, dtype)
    else:
        model, tokenizer = model_from_checkpoint(checkpoint)
        model.to(dtype=model.dtype if dtype == "auto" else getattr(torch, dtype))
    return TransformersLM(
        model.to(device),
        tokenizer,
        batch_size=batch_size,
        trained_here=checkpoint is not None or is_export(path),
        add_bos=bos_rule(checkpoint or path) if add_bos is None else add_bos,
    )


def _load_folder(path: Path, dtype: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM

    try:
        tokenizer = open_in_transformers(path, run_code=True)
        model, loading = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            trust_remote_code=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # from the libraries or the folder's own code
        raise CheckpointError(
            f"`{path}` cannot be loaded as a model in Hugging Face's format: "
            f"{type(error).__name__}: {error}"
        ) from error
    _check_weights(path, loading)
    return model, tokenizer


def _check_weights(path: Path, loading: dict) -> None:
    """Refuse missing weights, which transformers initialises at random with a mere warning."""
    for kind, problem in (("missing_keys", "lacks"), ("mismatched_keys", "has in another shape")):
        keys = sorted(map(str, loading.get(kind) or ()))
        if keys:
            shown = ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
            raise CheckpointError(
                f"`{path}` {problem} weights that its config.json implies: {shown}"
            )
