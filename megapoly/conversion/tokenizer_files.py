"""Write the tokenizer files of a model for transformers 4 and 5."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from megapoly.config import ModelConfig
from megapoly.data.special_tokens import CONFIG_NAME, read_tokenizer_config, token_text
from megapoly.data.tokenizer import BUILTIN_TOKENIZER, Tokenizer, load_tokenizer
from megapoly.errors import CheckpointError, DataError

_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
# Copied from a tokenizer's folder if present; transformers needs only tokenizer.json.
_COPIED = ("chat_template.jinja", "tokenizer.model")
# The class that follows tokenizer.json in every release. Classes of single models change it:
# with LlamaTokenizer, transformers 5 encodes "  a" to other ids.
_CLASS = "PreTrainedTokenizerFast"
# Fields that only such classes read, or that name other paths and code.
_LEFT_OUT = (
    "add_bos_token",
    "add_eos_token",
    "auto_map",
    "legacy",
    "name_or_path",
    "sp_model_kwargs",
    "tokenizer_file",
    "use_default_system_prompt",
)


@dataclasses.dataclass(frozen=True)
class SpecialTokenIds:
    """Special token ids of a tokenizer.

    Args:
        bos: id before a text; None if there is none.
        eos: id that ends a document.
        pad: id of padding.
    """

    bos: int | None
    eos: int
    pad: int


def write_tokenizer(
    source: str | Path | None,
    folder: Path,
    *,
    max_length: int,
    pad: int | None = None,
    add_bos: bool = False,
) -> SpecialTokenIds:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``, with the tokens of all its files.

    The files name a token to pad batches with: the tokenizer's own, else ``pad`` if it is a special
    token, else the end of a document. Padding is masked, so it may be a token of the text.

    Args:
        source: see :func:`megapoly.data.tokenizer.load_tokenizer`.
        folder: folder to write to.
        max_length: longest text, in tokens.
        pad: id of padding in the model's configuration.
        add_bos: texts of the model begin with ``bos_token``; written as ``add_bos_token`` if the
            tokenizer adds it.

    Raises:
        DataError: the tokenizer cannot be read, or names a special token that it does not have.
    """
    tokenizer = load_tokenizer(source)
    (folder / "tokenizer.json").write_text(tokenizer.json, encoding="utf-8")
    origin = Path(source) if source is not None else BUILTIN_TOKENIZER
    origin = origin if origin.is_dir() else origin.parent
    config = read_tokenizer_config(origin) if source is not None else {}
    written = {name: value for name, value in config.items() if name not in _LEFT_OUT}
    written["eos_token"] = tokenizer.token(tokenizer.eod)
    written |= {"tokenizer_class": _CLASS, "model_max_length": max_length}
    for name in _SPECIAL_TOKENS:
        if written.get(name) is not None:  # tokenizer.json says how spaces around it are read
            written[name] = token_text(written[name], name)
    if written.get("pad_token") is None:
        written["pad_token"] = _padding_token(tokenizer, pad)
    # The class's default includes token types, which a decoder does not accept.
    written.setdefault("model_input_names", ["input_ids", "attention_mask"])
    for name in _COPIED if source is not None else ():
        if (origin / name).is_file():
            shutil.copyfile(origin / name, folder / name)
    pad_id = _id(tokenizer, "pad_token", written)
    assert pad_id is not None
    special = SpecialTokenIds(
        bos=_id(tokenizer, "bos_token", written),
        eos=tokenizer.eod,
        pad=pad_id,
    )
    # Classes of single models put `bos_token` there, whatever tokenizer.json says.
    if add_bos and tokenizer.encode_with_special_tokens("") == [special.bos]:
        written["add_bos_token"] = True
    (folder / CONFIG_NAME).write_text(json.dumps(written, indent=2, ensure_ascii=False) + "\n")
    return special


def check_vocabulary(source: str | Path | None, model: ModelConfig) -> None:
    """Check that a tokenizer has no ids that a model does not have.

    Raises:
        CheckpointError: it has some.
        DataError: it cannot be read.
    """
    assert model.vocab_size is not None, "resolved"
    beyond = load_tokenizer(source).tokens_from(model.vocab_size)
    if beyond:
        named = [f"{i} (`{token}`)" for i, token in beyond.items()]
        more = f" and {len(named) - 3} more" if len(named) > 3 else ""
        raise CheckpointError(
            f"The tokenizer must have no ids from the model's `vocab_size` ({model.vocab_size}) "
            f"on, which have no embedding; it has {', '.join(named[:3])}{more}. If it is the "
            "model's own, copy its files to another folder, remove these tokens from "
            "tokenizer.json, added_tokens.json, tokenizer_config.json and special_tokens_map.json "
            "there, and give that folder with --tokenizer; otherwise give the model's own."
        )


def _padding_token(tokenizer: Tokenizer, pad: int | None) -> str:
    """Return the token of an id if it is special; transformers would cut it out of texts."""
    for token in json.loads(tokenizer.json).get("added_tokens") or ():
        if token["id"] == pad and token.get("special"):
            return token["content"]
    return tokenizer.token(tokenizer.eod)


def _id(tokenizer: Tokenizer, name: str, config: dict[str, Any]) -> int | None:
    text = config.get(name)
    if text is None:
        return None
    token_id = tokenizer.token_id(text)
    if token_id is None:
        # transformers would add it with an id that the model does not have.
        raise DataError(
            f"`{name}` of {CONFIG_NAME} must be in the vocabulary; {text!r} is not. Remove it from "
            "the file, or give another tokenizer with --tokenizer."
        )
    return token_id
