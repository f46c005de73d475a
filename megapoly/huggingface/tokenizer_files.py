"""The tokenizer's files beside a model, readable by transformers 4 and 5."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from megapoly.data.tokenizer import BUILTIN_TOKENIZER, Tokenizer, load_tokenizer

CONFIG_NAME = "tokenizer_config.json"
# Of a tokenizer's folder; transformers needs tokenizer.json alone.
_COPIED = ("special_tokens_map.json", "chat_template.jinja", "tokenizer.model")
# A class of any release that reads tokenizer.json; transformers 5 writes a name 4 does not know.
_CLASS = "PreTrainedTokenizerFast"
_NAMES_OF_ONE_RELEASE = ("TokenizersBackend", "PreTrainedTokenizer", None)


@dataclasses.dataclass(frozen=True)
class SpecialIds:
    """Ids that a model's configuration names.

    Args:
        bos: that transformers puts before a text; None: none.
        eos: that ends a document.
        pad: of padding; None: none of its own.
    """

    bos: int | None
    eos: int
    pad: int | None


def write_tokenizer(source: str | Path | None, folder: Path, *, seq_length: int) -> SpecialIds:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``.

    Args:
        source: as of :func:`megapoly.data.tokenizer.load_tokenizer`.
        folder: to write to.
        seq_length: that the model was trained with.

    Raises:
        DataError: the tokenizer cannot be read.
    """
    tokenizer = load_tokenizer(source)
    (folder / "tokenizer.json").write_text(tokenizer.json, encoding="utf-8")
    origin = Path(source) if source is not None else BUILTIN_TOKENIZER
    origin = origin if origin.is_dir() else origin.parent
    config = _config_of(origin) if source is not None else {}
    eos = config.get("eos_token") or tokenizer.token(tokenizer.eod)
    written = config | {"eos_token": eos, "model_max_length": seq_length}
    # The class's default has token types, which a decoder does not take.
    written.setdefault("model_input_names", ["input_ids", "attention_mask"])
    if written.get("tokenizer_class") in _NAMES_OF_ONE_RELEASE:
        written["tokenizer_class"] = _CLASS
    for name in _COPIED if source is not None else ():
        if (origin / name).is_file():
            shutil.copyfile(origin / name, folder / name)
    (folder / CONFIG_NAME).write_text(json.dumps(written, indent=2, ensure_ascii=False) + "\n")
    return SpecialIds(
        _id(tokenizer, written.get("bos_token")),
        tokenizer.eod,
        _id(tokenizer, written.get("pad_token")),
    )


def _config_of(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _id(tokenizer: Tokenizer, token: str | dict[str, Any] | None) -> int | None:
    name = token.get("content") if isinstance(token, dict) else token
    return None if name is None else tokenizer.token_id(name)
