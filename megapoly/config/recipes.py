"""The recipes that are installed with the package, by name."""

from __future__ import annotations

import difflib
from pathlib import Path

from megapoly.errors import ConfigError

FOLDER = Path(__file__).parents[1] / "recipes"


def recipe_names() -> list[str]:
    """Return the names of all installed recipes, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def recipe_path(name: str | Path) -> Path:
    """Find a recipe.

    Args:
        name: of an installed recipe, such as ``moe_tiny``, or path of a YAML file. Where both
            exist, the file is taken.

    Returns:
        The recipe's file; a path of a YAML file is returned as it is, whether it exists or not.

    Raises:
        ConfigError: ``name`` is a bare word and there is no recipe of that name.
    """
    path = Path(name)
    if path.is_file() or len(path.parts) > 1 or path.suffix in (".yaml", ".yml"):
        return path
    names = recipe_names()
    if path.name in names:
        return FOLDER / f"{path.name}.yaml"
    nearest = difflib.get_close_matches(path.name, names, n=1, cutoff=0.0)[0]
    raise ConfigError(
        [
            f"`--config` ({name}) is neither a file nor a recipe; the recipes are "
            f"{', '.join(names)}, and the nearest is {nearest}"
        ]
    )
