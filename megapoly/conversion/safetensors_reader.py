"""Read the tensors of a Hugging Face folder one at a time."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megapoly.conversion.safetensors_writer import DTYPES, INDEX_NAME, SINGLE_NAME
from megapoly.errors import CheckpointError
from megapoly.platform.files import is_plain_name

_ENDING = ".safetensors"
_DTYPE_OF_NAME = {name: dtype for dtype, name in DTYPES.items()}
# Constants that old releases of transformers saved with a model.
_CONSTANTS = ("rotary_emb.inv_freq",)


class SafetensorsReader:
    """Reader of the weights of a folder (:func:`weight_files`); a context manager.

    Args:
        folder: folder of the model.

    Raises:
        CheckpointError: a file is missing or cannot be read.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.config: dict[str, Any] = read_json(folder / "config.json")
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}

    def __enter__(self) -> SafetensorsReader:
        """Open every file, without reading tensors."""
        from safetensors import SafetensorError, safe_open

        for path in weight_files(self.folder):
            try:
                file = self._stack.enter_context(safe_open(path, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error
            self._files |= dict.fromkeys(file.keys(), file)
        return self

    def __exit__(self, *exception: object) -> None:
        """Close all files."""
        self._stack.close()

    @property
    def names(self) -> list[str]:
        """Names of all weights, without constants that some releases saved with them."""
        return [name for name in self._files if not name.endswith(_CONSTANTS)]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return tuple(self._files[name].get_slice(name).get_shape())

    def dtypes(self) -> set[torch.dtype]:
        """Return the dtypes of all weights.

        Raises:
            CheckpointError: one is not a supported floating-point type.
        """
        named = {self._files[name].get_slice(name).get_dtype() for name in self.names}
        if unknown := named - set(_DTYPE_OF_NAME):
            raise CheckpointError(
                f"Weights must be {', '.join(_DTYPE_OF_NAME)}; {self.folder} has "
                f"{', '.join(sorted(unknown))}. Convert them with transformers first."
            )
        return {_DTYPE_OF_NAME[name] for name in named}

    def read(self, name: str) -> Tensor:
        """Read one tensor."""
        return self._files[name].get_tensor(name)


def weight_files(folder: Path) -> list[Path]:
    """Return the files that hold a folder's weights, as transformers chooses them.

    It is ``model.safetensors``, else what the index names, else all ``*.safetensors``. Others
    beside them hold the weights once more, such as ``consolidated.safetensors``.

    Raises:
        CheckpointError: there is none, one is missing, or the index names one that is not a
            safetensors file of this folder.
    """
    index = folder / INDEX_NAME
    if (folder / SINGLE_NAME).is_file():
        paths = [folder / SINGLE_NAME]
    elif index.is_file():
        paths = [folder / name for name in _names_in_index(index)]
    else:
        paths = sorted(folder.glob("*.safetensors"))
    missing = [path.name for path in paths if not path.is_file()]
    if missing or not paths:
        problem = f"lacks {', '.join(missing)}" if missing else "has no *.safetensors"
        raise CheckpointError(
            f"{folder} {problem}. To convert a model from another format, use "
            "`AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OTHER)`."
        )
    return paths


def _names_in_index(index: Path) -> list[str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index} must have an object `weight_map`.")
    for name in weight_map.values():
        if not is_plain_name(name) or not name.endswith(_ENDING):
            raise CheckpointError(
                f"`weight_map` in {index} must name *{_ENDING} files beside it; it names {name!r}."
            )
    return sorted(set(weight_map.values()))


def read_json(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file.

    Raises:
        CheckpointError: the file is missing, or is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} must be a JSON file of a Hugging Face model: {error}"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object.")
    return content
