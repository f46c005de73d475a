"""Logs and warnings to show of this project, the engine and libraries; output without a reader."""

from __future__ import annotations

import logging
import os
import sys
import warnings


def configure_logging(*, is_rank_zero: bool) -> None:
    """Show this project's log on rank 0, and only errors of the engine.

    For jobs of several processes, such as training.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("megapoly").setLevel(logging.INFO if is_rank_zero else logging.WARNING)
    logging.getLogger("megatron.core.rerun_state_machine").setLevel(logging.ERROR)
    # Missing optional packages, once for each module that would use them.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
    # The engine calls collectives, and loads checkpoints, by the names of torch before 2.13.
    for module in (r"torch\.distributed", r"megatron\.core"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)


def show_errors_only() -> None:
    """Show only errors of what the engine and libraries log, and none of their warnings.

    For commands of one process, which report in their own way. What this project says about the
    user's data, tokenizer and checkpoints is shown.
    """
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    for name in ("megapoly.data", "megapoly.checkpoints"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore")


# Read by the libraries of LM Evaluation Harness when they are imported.
_EVALUATION_SETTINGS = {
    "TQDM_DISABLE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}


def silence_evaluation_libraries() -> None:
    """Disable the progress bars and messages of LM Evaluation Harness's libraries.

    They would show several bars a task; this project shows one for all. Call it before these
    libraries are imported.
    """
    for name, value in _EVALUATION_SETTINGS.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", module="transformers|datasets|torch")
    for name in ("transformers", "datasets", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)


def discard_output() -> None:
    """Write the rest of the output to nowhere, because its reader, such as ``head``, has ended."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
