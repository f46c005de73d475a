"""Read tensors and objects of a checkpoint without executing anything in it.

torch's own reader unpickles ``.metadata`` (distributed/checkpoint/filesystem.py:930) and objects
(default_planner.py:387) with whatever code they name.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

from megapoly.checkpoints.tensor_metadata import read_metadata
from megapoly.errors import CheckpointError

# Of NumPy's random state. torch knows it as safe, and does not have it in its own list.
_SAFE = [
    (np.zeros(0).__reduce__()[0], "numpy.core.multiarray._reconstruct"),
    (np.zeros(0).__reduce__()[0], "numpy._core.multiarray._reconstruct"),
    np.ndarray,
    np.dtype,
    type(np.dtype(np.uint32)),
]


class TensorReader(FileSystemReader):
    """torch's reader of ``.distcp`` files, with an index that is only data; reads it once."""

    _index: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the index of the tensors.

        Raises:
            CheckpointError: see :func:`megapoly.checkpoints.tensor_metadata.read_metadata`.
        """
        if self._index is None:
            self._index = read_metadata(Path(self.path))
        return self._index


def load_object(stream: IO[bytes]) -> Any:
    """Return an object that ``torch.save`` wrote: tensors, arrays, numbers, text and containers.

    Raises:
        CheckpointError: it names anything else, or is damaged.
    """
    data = stream.read()
    try:
        with torch.serialization.safe_globals(_SAFE):
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive or pickle can raise anything
        lines = [line for line in str(error).splitlines() if "GLOBAL" in line or "Error" in line]
        raise CheckpointError(
            "an object of the checkpoint is damaged, or names code, which was not executed: "
            f"{lines[0].strip() if lines else repr(error)}"
        ) from error
