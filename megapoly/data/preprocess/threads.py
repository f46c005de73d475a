"""Keep libraries from starting threads: a process of one thread can be forked."""

from __future__ import annotations

import os

_SETTINGS = {
    "OPENBLAS_NUM_THREADS": "1",  # numpy's, for products of matrices, which do not occur here
    "TOKENIZERS_PARALLELISM": "false",  # for batches; the workers are the parallelism
    "JE_ARROW_MALLOC_CONF": "background_thread:false",  # pyarrow's, which returns memory
}


def use_one_thread() -> None:
    """Set the environment variables that numpy, tokenizers and pyarrow read on import.

    Forked workers share the loaded tokenizer. Variables that the user has set are kept. Call it
    before any of the three is imported.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
