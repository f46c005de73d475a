"""Load the model that one process evaluates."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megapoly.conversion.checkpoint_reader import checkpoint_of_model
from megapoly.errors import UnavailableError

if TYPE_CHECKING:
    from megapoly.evaluation.transformers_lm import TransformersLM


def load_lm(
    path: Path,
    *,
    dtype: str,
    device: str,
    batch_size: int,
    add_bos: bool | None = None,
    run_code: bool = False,
) -> TransformersLM:
    """Load a model for the harness; nothing is downloaded.

    Args:
        path: a folder in Hugging Face's format, a checkpoint ``iter_*``, which is converted in
            memory, or a run, for its newest checkpoint.
        dtype: one of :data:`megapoly.evaluation.request.DTYPES`; ``auto`` is the stored one.
        device: device by torch's name.
        batch_size: sequences per forward pass.
        add_bos: see :class:`megapoly.evaluation.transformers_lm.TransformersLM`; None: as a
            checkpoint or an export records it (:mod:`megapoly.conversion.bos_rule`).
        run_code: run code in a Hugging Face folder, see
            :func:`megapoly.conversion.transformers_model.model_from_folder`.

    Raises:
        CheckpointError: ``path`` is not a model, a file is missing or damaged, the weights do
            not fit the model, or it needs code that is not run.
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
    from megapoly.conversion.transformers_model import model_from_checkpoint, model_from_folder
    from megapoly.platform.device import check_device

    checkpoint = checkpoint_of_model(path)
    check_device("device", device)
    if checkpoint is None:
        model, tokenizer = model_from_folder(path, dtype=dtype, run_code=run_code)
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
