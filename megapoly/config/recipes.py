"""The recipes that are installed with megapoly, by name."""

from __future__ import annotations

import difflib
from pathlib import Path

from megapoly.config.options import short
from megapoly.errors import ConfigError
from megapoly.platform.files import is_file

FOLDER = Path(__file__).parents[1] / "recipes"


def recipe_names() -> list[str]:
    """Return the names of all installed recipes, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def recipe_path(name: str | Path) -> Path:
    """Return the file of a recipe.

    Args:
        name: of an installed recipe, such as ``moe_tiny``, or path of a YAML file. A file of that
            name in the current folder comes first.

    Returns:
        The recipe's file; the path of a YAML file as it is, whether it exists or not.

    Raises:
        ConfigError: ``name`` is neither a path nor the name of a recipe.
    """
    path = Path(name)
    if is_file(path) or len(path.parts) > 1 or path.suffix in (".yaml", ".yml"):
        return path
    names = recipe_names()
    if path.name in names:
        return FOLDER / f"{path.name}.yaml"
    nearest = difflib.get_close_matches(short(path.name), names, n=1, cutoff=0.0)[0]
    raise ConfigError(
        [
            f"`--config` ({short(name)}) is neither a file nor a recipe; the nearest recipe is "
            f"{nearest}, of {', '.join(names)}"
        ]
    )
