"""Whether the texts of a model begin with a token such as ``<s>``: recorded and followed.

A model of Hugging Face reads texts as its tokenizer in transformers encodes them. A model that is
trained here reads them without added tokens. An imported checkpoint records the rule of its source
in ``run.json`` (``add_bos``), runs that start from it keep it, and an export has it as
``add_bos_token`` in ``tokenizer_config.json``.
"""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers

from megapoly.conversion.architecture import MODEL_TYPE
from megapoly.conversion.checkpoint_reader import checkpoint_of_model
from megapoly.conversion.safetensors_reader import read_json
from megapoly.conversion.transformers_tokenizer import AddedIds, added_by_transformers
from megapoly.data.special_tokens import CONFIG_NAME, read_object
from megapoly.data.tokenizer import load_tokenizer


def bos_rule(path: Path) -> bool | None:
    """Return whether texts of a model begin with BOS; None if its tokenizer decides.

    Args:
        path: a checkpoint, a run, or a Hugging Face folder.
    """
    checkpoint = checkpoint_of_model(path)
    if checkpoint is not None:
        return bool(read_json(checkpoint / "run.json").get("add_bos", False))
    if is_export(path):
        return read_object(path / CONFIG_NAME).get("add_bos_token") is True
    return None


def is_export(folder: Path) -> bool:
    """Check whether ``megapoly export`` wrote a folder; a plain Llama is known by its report."""
    kind = read_json(folder / "config.json").get("model_type")
    return kind == MODEL_TYPE or (folder / "parity.json").is_file()


def rule_of_import(model: Path, tokenizer: str | None, written: Path) -> bool:
    """Return the rule of an imported model; make the written tokenizer add what transformers adds.

    Args:
        model: the Hugging Face folder.
        tokenizer: file or folder that replaces its tokenizer; None: its own.
        written: folder with the tokenizer of the import; its ``tokenizer.json`` may change.
    """
    recorded = bos_rule(model) if tokenizer is None else None
    source = model if tokenizer is None else Path(tokenizer)
    if recorded is not None:
        return recorded
    if not source.is_dir():
        return bool(added_by_file(written).prefix)
    added = added_by_transformers(source)
    if added != added_by_file(written):
        _write_template(written / "tokenizer.json", added)
    return bool(added.prefix)


def added_by_file(folder: Path) -> AddedIds:
    """Return the ids that the post-processor of a ``tokenizer.json`` adds."""
    tokenizer = load_tokenizer(folder)
    return AddedIds.between(tokenizer.encode("a"), tokenizer.encode_with_special_tokens("a"))


def _write_template(path: Path, added: AddedIds) -> None:
    """Replace the post-processor of a ``tokenizer.json``: a class of transformers has its own."""
    library = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    names = {i: library.id_to_token(i) for i in (*added.prefix, *added.suffix)}
    prefix, suffix = ([names[i] for i in ids] for ids in (added.prefix, added.suffix))
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single=[*prefix, "$A", *suffix],
        pair=[*prefix, "$A", *suffix, *prefix, "$B:1", *suffix],
        special_tokens=[(name, i) for i, name in names.items()],
    )
    path.write_text(json.dumps(json.loads(library.to_str()), ensure_ascii=False, indent=2), "utf-8")
