"""One bar for everything stands in the place of the libraries' own, several a task."""

from __future__ import annotations

import logging
import os
import warnings

_SETTINGS = {
    "TQDM_DISABLE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}


def quieten_libraries() -> None:
    """Set what the harness's libraries read when they are imported; call it before that."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", module="transformers|datasets|torch")
    for name in ("transformers", "datasets", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
