"""Read ``.metadata``, the index of a checkpoint's tensors, without executing anything in it."""

from __future__ import annotations

import pickle
from pathlib import Path, PurePosixPath
from typing import IO, Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from megapoly.errors import CheckpointError

NAME = ".metadata"

# All that torch 2.6 to 2.13 and the engine write into the file, besides dtypes.
_ALLOWED = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "Metadata"),
    ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
    ("torch.distributed.checkpoint.metadata", "StorageMeta"),
    ("torch.distributed.checkpoint.metadata", "TensorProperties"),
    ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.planner", "SavePlan"),
    ("torch.distributed.checkpoint.planner", "TensorWriteData"),
    ("torch.distributed.checkpoint.planner", "WriteItem"),
    ("torch.distributed.checkpoint.planner", "WriteItemType"),
}


def read_metadata(folder: Path) -> Metadata:
    """Return the index of the tensors in a checkpoint's folder.

    Raises:
        CheckpointError: the file is missing, is damaged, names code, or names files elsewhere.
    """
    path = folder / NAME
    try:
        with path.open("rb") as stream:
            return load_metadata(stream)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error


def load_metadata(stream: IO[bytes]) -> Metadata:
    """Return the index that a stream has; see :func:`read_metadata`."""
    try:
        metadata = _Unpickler(stream).load()
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(f"it is damaged ({type(error).__name__}: {error})") from error
    _check(metadata)
    return metadata


class _Unpickler(pickle.Unpickler):
    """Unpickler that knows the classes of ``.metadata`` and refuses all other names."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) in _ALLOWED or is_dtype:
            return super().find_class(module, name)
        if module.partition(".")[0] == "pathlib" and name == "PosixPath":
            return PurePosixPath  # the folder that was written to; Python 3.13 moved the class
        raise CheckpointError(
            f"it names `{module}.{name}`, which has no place in an index of tensors. Nothing was "
            "executed; use checkpoints only from people that you trust"
        )


def _check(metadata: Any) -> None:
    """Check that an unpickled object is an index, of files in its own folder."""
    if not isinstance(metadata, Metadata) or not isinstance(
        getattr(metadata, "storage_data", None), dict
    ):
        raise CheckpointError("it is not an index of tensors")
    for name in {getattr(info, "relative_path", None) for info in metadata.storage_data.values()}:
        if not isinstance(name, str) or name in ("", ".", "..") or PurePosixPath(name).name != name:
            raise CheckpointError(
                f"it names `{name}`; all files of a checkpoint must be in its own folder"
            )
