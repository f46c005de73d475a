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
    """Special token ids of a model's configuration.

    Args:
        bos: id before a text; None if there is none.
        eos: id that ends a document.
        pad: id of padding; None if it has no separate id.
    """

    bos: int | None
    eos: int
    pad: int | None


def write_tokenizer(
    source: str | Path | None, folder: Path, *, seq_length: int, add_bos: bool = False
) -> SpecialTokenIds:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``, with the tokens of all its files.

    Args:
        source: see :func:`megapoly.data.tokenizer.load_tokenizer`.
        folder: folder to write to.
        seq_length: sequence length that the model was trained with.
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
    written |= {"tokenizer_class": _CLASS, "model_max_length": seq_length}
    for name in _SPECIAL_TOKENS:
        if name in written:  # tokenizer.json says how spaces around it are read
            written[name] = token_text(written[name], name)
    # The class's default includes token types, which a decoder does not accept.
    written.setdefault("model_input_names", ["input_ids", "attention_mask"])
    for name in _COPIED if source is not None else ():
        if (origin / name).is_file():
            shutil.copyfile(origin / name, folder / name)
    special = SpecialTokenIds(
        bos=_id(tokenizer, "bos_token", written),
        eos=tokenizer.eod,
        pad=_id(tokenizer, "pad_token", written),
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
    size = load_tokenizer(source).vocab_size
    if size > model.vocab_size:
        raise CheckpointError(
            f"The tokenizer's ids ({size}) must not exceed the model's `vocab_size` "
            f"({model.vocab_size}); give the model's own tokenizer with --tokenizer."
        )


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
