"""Libraries of the extra ``hf``, which only conversion and generation need."""

from __future__ import annotations

import importlib.util

from megapoly.errors import UnavailableError

_NEEDED = ("accelerate", "safetensors", "transformers")


def require_hf_extra() -> None:
    """Check that the libraries are installed, without importing them.

    Raises:
        UnavailableError: some are missing.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UnavailableError(
            f"Hugging Face models need {', '.join(_NEEDED)}, but {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not installed: pip install 'megapoly[hf]'"
        )
