"""Find the input files and their formats."""

from __future__ import annotations

import glob
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megapoly.data.special_tokens import read_object
from megapoly.errors import DataError
from megapoly.platform.files import is_plain_name

logger = logging.getLogger(__name__)

# Format by file name ending; the longest ending that matches counts.
FORMATS = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".ndjson": "jsonl",
    ".jsonl.gz": "jsonl.gz",
    ".json.gz": "jsonl.gz",
    ".jsonl.zst": "jsonl.zst",
    ".json.zst": "jsonl.zst",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "txt",
}


@dataclass(frozen=True)
class SourceFile:
    """An input file.

    Args:
        path: path of the file.
        format: one of the values of ``FORMATS``.
        size_bytes: size on disk.
        modified_ns: time of its last change.
    """

    path: Path
    format: str
    size_bytes: int
    modified_ns: int


def find_source_files(inputs: Sequence[str]) -> list[SourceFile]:
    """Return the files that ``--input`` names, in the order of reading.

    Args:
        inputs: files; patterns such as ``data/*.jsonl`` (matches in sorted order); folders (all
            files below them with a known ending except ``.json``, sorted by path, without hidden
            ones); and folders written by ``datasets.Dataset.save_to_disk``.

    Raises:
        DataError: a path does not exist, has an unknown ending or contains no input, or a file is
            named twice.
    """
    paths = [path for name in inputs for path in _paths_of(name)]
    seen: dict[Path, Path] = {}
    for path in paths:
        first = seen.setdefault(path.resolve(), path)
        if first is not path:
            raise DataError(
                f"`--input` must name every file once; `{path}` is named twice"
                + (f", also as `{first}`" if first != path else "")
                + ". To train on a text more often, increase its weight in the blend."
            )
    return [_source(path) for path in paths]


def _paths_of(name: str) -> list[Path]:
    path = Path(name)
    if path.is_dir():
        return _paths_in(path)
    if path.exists() or path.is_symlink():
        return [path]
    matches = sorted(Path(match) for match in glob.glob(name, recursive=True))
    if not matches:
        raise DataError(f"`--input` must name files, folders or patterns; `{name}` matches none.")
    return [
        inner for match in matches for inner in (_paths_in(match) if match.is_dir() else [match])
    ]


def _paths_in(folder: Path) -> list[Path]:
    if (folder / "dataset_dict.json").is_file():
        splits = read_object(folder / "dataset_dict.json").get("splits") or []
        raise DataError(
            f"`{folder}` holds several splits; name the ones to use: "
            f"{', '.join(str(folder / split) for split in splits)}."
        )
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return _saved_dataset(folder)
    known = sorted(path for path in _files_below(folder) if _format(path) is not None)
    # In a folder of text such a file mostly holds settings of a tokenizer or dataset.
    settings = [path for path in known if path.name.lower().endswith(".json")]
    found = [path for path in known if path not in set(settings)]
    if settings:
        logger.warning(
            "`%s`: %d files that end with .json are left out (%s, ..); if they contain text, name "
            "them with a pattern.",
            folder,
            len(settings),
            settings[0].name,
        )
    if not found:
        raise DataError(
            f"`{folder}` holds no file that ends with one of "
            f"{', '.join(ending for ending in FORMATS if ending != '.json')}; name the files "
            "themselves."
        )
    return found


def _files_below(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _files_below(path)
        elif path.is_file():
            yield path


def _saved_dataset(folder: Path) -> list[Path]:
    """Return the Arrow files of a saved ``datasets.Dataset``, in its order."""
    state = read_object(folder / "state.json")
    if state.get("_indices_files"):
        raise DataError(
            f"`{folder}` is a selection of rows (it has an indices mapping), which its Arrow files "
            "do not show; save it again after `dataset.flatten_indices()`."
        )
    try:
        names = [entry["filename"] for entry in state["_data_files"]]
    except (KeyError, TypeError) as error:
        raise DataError(
            f"`{folder / 'state.json'}` must list the dataset's files (`_data_files`); save the "
            "dataset again."
        ) from error
    for name in names:
        if not is_plain_name(name):
            raise DataError(
                f"`{folder / 'state.json'}` must name files beside it; it names {name!r}. Save the "
                "dataset again."
            )
    return [folder / name for name in names]


def _format(path: Path) -> str | None:
    endings = [ending for ending in FORMATS if path.name.lower().endswith(ending)]
    return FORMATS[max(endings, key=len)] if endings else None


def _source(path: Path) -> SourceFile:
    format_ = _format(path)
    if format_ is None:
        raise DataError(
            f"`{path}` must end with one of {', '.join(FORMATS)}, which sets its format; rename "
            "it, or link to it under such a name."
        )
    if not path.is_file():
        raise DataError(f"`{path}` must be a file; it is something else, or a broken link.")
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"The name of {str(path)!r} must be UTF-8; rename the file.") from error
    status = path.stat()
    return SourceFile(path, format_, status.st_size, status.st_mtime_ns)
