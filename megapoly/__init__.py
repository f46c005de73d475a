"""Pre-training of PolyCom language models on Megatron-Core.

    from megapoly import PolyNorm, PolyReLU  # modules; the functions are in megapoly.ops
    from megapoly import Config, load_recipe

Each name is imported when it is first used: ``import megapoly`` imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megapoly.config import Config, load_recipe
    from megapoly.ops import PolyNorm, PolyReLU

__version__ = "0.1.0"

_MODULES = {
    "Config": "megapoly.config",
    "PolyNorm": "megapoly.ops",
    "PolyReLU": "megapoly.ops",
    "load_recipe": "megapoly.config",
}

__all__ = ["Config", "PolyNorm", "PolyReLU", "__version__", "load_recipe"]

if not TYPE_CHECKING:  # type checkers would take every name for one of the package

    def __getattr__(name: str) -> Any:
        """Import a public name when it is first used."""
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(_MODULES[name]), name)

    def __dir__() -> list[str]:
        """Return the names of the module, those not yet imported included."""
        return sorted({*globals(), *_MODULES})
