"""The libraries of the extra ``hf``, which the rest of the package goes without."""

from __future__ import annotations

import importlib.util

from megapoly.errors import UnavailableError

_NEEDED = ("accelerate", "safetensors", "transformers")


def require_hf_extra() -> None:
    """Check that they are installed; imports none of them.

    Raises:
        UnavailableError: some are missing.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UnavailableError(
            f"Hugging Face folders need {', '.join(_NEEDED)}, and {', '.join(missing)} is not "
            "installed: pip install 'megapoly[hf]'."
        )
