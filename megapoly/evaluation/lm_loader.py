"""Open what is to be evaluated by one process."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from megapoly.errors import CheckpointError, UnavailableError

if TYPE_CHECKING:
    from megapoly.evaluation.transformers_lm import TransformersLM

DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_lm(
    path: Path, *, dtype: str, device: str, batch_size: int, add_bos: bool = False
) -> TransformersLM:
    """Return a model, for the harness; nothing is downloaded.

    Code in a Hugging Face folder is executed (``trust_remote_code``).

    Args:
        path: a folder in Hugging Face's format, a checkpoint ``iter_*``, which is converted in
            memory, or a run, for its newest checkpoint.
        dtype: one of ``DTYPES``; ``auto`` is the one it is stored in.
        device: as torch names it.
        batch_size: sequences at a time.
        add_bos: see :class:`megapoly.evaluation.transformers_lm.TransformersLM`.

    Raises:
        CheckpointError: there is no model, or not a whole one: a file is missing or damaged, or the
            weights are not those of the model.
        EvaluationError: ``add_bos``, and the tokenizer puts nothing before a text.
        UnavailableError: there is no such device, or a library is missing.
    """
    try:
        from megapoly.evaluation.transformers_lm import TransformersLM
    except ImportError as error:
        raise UnavailableError(
            f"evaluation needs the LM Evaluation Harness, transformers and accelerate ({error}): "
            "pip install 'megapoly[eval]'"
        ) from error
    import torch

    from megapoly.conversion.transformers_model import model_from_checkpoint
    from megapoly.platform.device import check_device

    checkpoint = checkpoint_of(path)
    check_device("device", device)
    if checkpoint is None:
        model, tokenizer = _from_folder(path, dtype)
    else:
        model, tokenizer = model_from_checkpoint(checkpoint)
        model.to(dtype=model.dtype if dtype == "auto" else getattr(torch, dtype))
    return TransformersLM(
        model.to(device),
        tokenizer,
        batch_size=batch_size,
        trained_here=checkpoint is not None or _is_export(path),
        add_bos=add_bos,
    )


def checkpoint_of(path: Path) -> Path | None:
    """Return the checkpoint that a path names; None where it is a Hugging Face folder.

    Raises:
        CheckpointError: it is neither.
    """
    from megapoly.conversion.checkpoint_reader import find_checkpoint

    checkpoint = find_checkpoint(path)
    if checkpoint is None and not (path / "config.json").is_file():
        raise CheckpointError(
            f"`{path}` is no model: a folder in Hugging Face's format has a config.json, a "
            "complete checkpoint `iter_*` a run.json, a run such a checkpoint"
            + ("" if path.is_dir() else "; there is no such folder")
        )
    return checkpoint


def _from_folder(path: Path, dtype: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

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
    return model, tokenizer


def _is_export(path: Path) -> bool:
    """Whether ``megapoly export`` wrote a folder; of a plain Llama its report tells."""
    from megapoly.conversion.architecture import MODEL_TYPE
    from megapoly.conversion.safetensors_reader import read_json

    kind = read_json(path / "config.json").get("model_type")
    return kind == MODEL_TYPE or (path / "parity.json").is_file()


def _check_weights(path: Path, loading: dict) -> None:
    """Transformers only warns, and draws at random what is missing."""
    for kind, what in (("missing_keys", "lacks"), ("mismatched_keys", "has in another shape")):
        keys = sorted(map(str, loading.get(kind) or ()))
        if keys:
            shown = ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
            raise CheckpointError(f"`{path}` {what} weights that its config.json asks for: {shown}")
