"""Prepare several domains of text: one tokenizer, and training and validation data of each."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from megapoly.config.data_sources import MEAN
from megapoly.data.builtin import BUILTIN_TEXT, builtin_documents
from megapoly.data.preprocess.console_output import print_plain
from megapoly.data.preprocess.options import PreprocessOptions
from megapoly.data.preprocess.run import preprocess
from megapoly.data.token_files import sha256_of
from megapoly.data.tokenizer_training import train_tokenizer
from megapoly.errors import DataError
from megapoly.platform.files import write_text

# The document of each `held_out` that is validation: not the first, which may be a preface.
_OFFSET = 10
_TRAIN, _VALIDATION = "train", "validation"


@dataclass(frozen=True)
class DomainOptions:
    """Options of ``megapoly prepare-domains``.

    Args:
        input: a ``.jsonl`` file for each domain, with ``{"text": ..}`` on each line, or folders of
            them; empty: the built-in text, by author.
        output: folder to create.
        vocab_size: vocabulary size of the tokenizer.
        held_out: one in so many documents of a domain is validation data. The built-in text has its
            own split.
        tokenizer_mb: text of each domain that the tokenizer is trained on, from its beginning, in
            million characters.
    """

    input: tuple[Path, ...]
    output: Path
    vocab_size: int = 2048
    held_out: int = 20
    tokenizer_mb: float = 2.0

    @property
    def recipe(self) -> Path:
        """Recipe of the data, for ``--config`` after a model's recipe."""
        return self.output / "data.yaml"


def prepare_domains(options: DomainOptions, console: Console) -> Path:
    """Write ``text/``, ``tokenizer.json``, ``tokens/`` and finally ``data.yaml``.

    In ``data.yaml`` every domain has the same share of the training tokens, and its own validation
    set. A complete folder is left unchanged; an interrupted preparation starts from the beginning.

    Args:
        options: options of the command.
        console: output for progress.

    Returns:
        The path of ``data.yaml``.

    Raises:
        DataError: the folder holds other text or was made with other options, a domain has too few
            documents or the name of another, or its text cannot be read.
    """
    files = [] if not options.input else domain_files(options.input)
    description = _description(options, files)
    record = options.output / "domains.json"
    if options.recipe.exists() and (written := _read(record)) != description:
        differ = ", ".join(f"`{k}`" for k in description if description[k] != written.get(k))
        raise DataError(
            f"`--output` ({options.output}) holds domains made differently ({differ} differ); "
            "choose another folder, or delete this one."
        )
    if options.recipe.exists():
        print_plain(console, f"{options.recipe}: complete")
        return options.recipe
    text = options.output / "text"
    text.mkdir(parents=True, exist_ok=True)
    names = _write_builtin(text) if not files else _split_files(files, text, options.held_out)
    tokenizer = options.output / "tokenizer.json"
    trained = train_tokenizer(
        (t for name in names for t in _first_texts(text / f"{name}.{_TRAIN}.jsonl", options)),
        options.vocab_size,
    )
    trained.save(str(tokenizer))
    for name in names:
        for split in (_TRAIN, _VALIDATION):
            print_plain(console, f"{name}, {split}")
            preprocess(
                PreprocessOptions(
                    input=(str(text / f"{name}.{split}.jsonl"),),
                    output_prefix=options.output / "tokens" / f"{name}.{split}",
                    tokenizer_model=str(tokenizer),
                    append_eod=True,
                    overwrite=True,
                ),
                console,
            )
    write_text(record, json.dumps(description, indent=1) + "\n")
    write_text(options.recipe, yaml.safe_dump(_recipe(options, names), sort_keys=False))
    return options.recipe


def domain_files(paths: Iterable[Path]) -> list[Path]:
    """Return the ``.jsonl`` file of each domain, sorted within folders; its name is the domain's.

    Raises:
        DataError: a path does not exist, there are no files, or two have the same name.
    """
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise DataError(f"`--input` must exist: {path} does not.")
        found += sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    names = [path.stem for path in found]
    if MEAN in names:
        raise DataError(
            f"`--input` must not name a domain `{MEAN}`, which is the mean over all validation "
            "sets; rename the file."
        )
    if not found or len(set(names)) < len(names):
        raise DataError(
            "`--input` must name one or more .jsonl files, each domain once; "
            f"found: {', '.join(names) or 'none'}."
        )
    return found


def _read(record: Path) -> dict[str, Any]:
    """Return what a complete folder was made from; {} if the file is damaged or missing."""
    try:
        return dict(json.loads(record.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _description(options: DomainOptions, files: Sequence[Path]) -> dict[str, Any]:
    return {
        "input": {path.stem: sha256_of(path) for path in files or [BUILTIN_TEXT]},
        "vocab_size": options.vocab_size,
        "held_out": options.held_out if files else "as the built-in text says",
        "tokenizer_mb": options.tokenizer_mb,
    }


def _write_builtin(text: Path) -> list[str]:
    """Write the built-in text by author; return the names of the authors."""
    documents = builtin_documents()
    names = sorted({document.source.split("/")[0] for document in documents})
    for name in names:
        for split in (_TRAIN, _VALIDATION):
            chosen = (
                json.dumps({"text": d.text, "source": d.source}, ensure_ascii=False)
                for d in documents
                if d.split == split and d.source.split("/")[0] == name
            )
            _write_lines(text / f"{name}.{split}.jsonl", chosen)
    return names


def _split_files(files: Sequence[Path], text: Path, held_out: int) -> list[str]:
    """Split the lines of each file in two; return the names of the domains."""
    for path in files:
        counts = [
            _write_lines(text / f"{path.stem}.{split}.jsonl", _lines_of(path, split, held_out))
            for split in (_TRAIN, _VALIDATION)
        ]
        if 0 in counts:
            raise DataError(
                f"Every domain must have documents to train on and to hold out; {path} has "
                f"{sum(counts)}, of which every {held_out}th is held out."
            )
    return [path.stem for path in files]


def _lines_of(path: Path, split: str, held_out: int) -> Iterator[str]:
    for number, line in enumerate(_documents(path)):
        if (number % held_out == min(_OFFSET, held_out - 1)) == (split == _VALIDATION):
            yield line


def _documents(path: Path) -> Iterator[str]:
    """Yield the lines of a file, each with a text, without empty lines."""
    num_valid = 0
    try:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                if line.strip():
                    if not isinstance(json.loads(line)["text"], str):
                        raise TypeError("`text` is not a string")
                    yield line.rstrip("\n")
                num_valid += 1
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f'Every line of a domain must be {{"text": ...}} in UTF-8; {path} is not after line '
            f"{num_valid} ({type(error).__name__}: {error}). Fix or delete it."
        ) from error


def _write_lines(path: Path, lines: Iterable[str]) -> int:
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for line in lines:
            file.write(f"{line}\n")
            count += 1
    return count


def _first_texts(path: Path, options: DomainOptions) -> Iterator[str]:
    """Yield the first ``tokenizer_mb`` million characters of a domain, in whole texts."""
    left = options.tokenizer_mb * 1e6
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            text = json.loads(line)["text"]
            yield text
            left -= len(text)
            if left <= 0:
                return


def _recipe(options: DomainOptions, names: Sequence[str]) -> dict[str, Any]:
    tokens = options.output / "tokens"
    return {
        "data": {
            "blend": [
                {"path": f"{tokens}/{name}.{_TRAIN}_text_document", "weight": 1.0, "name": name}
                for name in names
            ],
            "validation": {name: f"{tokens}/{name}.{_VALIDATION}_text_document" for name in names},
            "tokenizer": str(options.output / "tokenizer.json"),
        }
    }
