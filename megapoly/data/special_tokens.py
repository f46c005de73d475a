"""Special tokens that the files beside a ``tokenizer.json`` name, read as transformers reads them.

Source: transformers 5.24, ``PreTrainedTokenizerBase._from_pretrained``
(tokenization_utils_base.py) and ``TokenizersBackend.__init__`` (tokenization_utils_tokenizers.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megapoly.errors import DataError

if TYPE_CHECKING:
    import tokenizers

CONFIG_NAME = "tokenizer_config.json"
_MAP_NAME, _ADDED_NAME = "special_tokens_map.json", "added_tokens.json"
# Files of a model, which name the end of a document by its id.
_MODEL_FILES = ("generation_config.json", "config.json")
_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_ADDITIONAL = ("extra_special_tokens", "additional_special_tokens")
END_OF_DOCUMENT_NAMES = ("<|endoftext|>", "</s>", "<eos>")


def find_end_of_document(path: Path, library: tokenizers.Tokenizer) -> int:
    """Return the id of the end-of-document token.

    It is the ``eos_token`` of ``tokenizer_config.json`` and ``special_tokens_map.json``, else the
    ``eos_token_id`` of ``generation_config.json`` and ``config.json``, else the first of
    ``END_OF_DOCUMENT_NAMES`` in the vocabulary. A list of ids agrees with each of them.

    Args:
        path: a ``tokenizer.json``; the others are beside it.
        library: the tokenizer.

    Raises:
        DataError: the files disagree or cannot be read, the token is not in the vocabulary, or none
            is named.
    """
    named = dict(_named_tokens(path, library)) | dict(_named_ids(path))
    agreed = set.intersection(*named.values()) if named else set()
    if len(agreed) == 1:
        (token_id,) = agreed
        if library.id_to_token(token_id) is None:
            raise DataError(
                f"The end-of-document token must be in the vocabulary of `{path}`; "
                f"{' and '.join(named)} name {token_id}, which is not. Correct the files."
            )
        return token_id
    if named:
        found = "; ".join(
            f"{file} names {' or '.join(_shown(library, each) for each in sorted(ids))}"
            for file, ids in named.items()
        )
        raise DataError(
            f"The files beside `{path}` must name one end-of-document token: {found}. Name the "
            "token that ends your documents in all of them; or copy the tokenizer's files to a "
            f"folder of their own, name it as `eos_token` in {CONFIG_NAME} there, and give that "
            "folder as the tokenizer."
        )
    for name in END_OF_DOCUMENT_NAMES:
        usual: int | None = library.token_to_id(name)
        if usual is not None:
            return usual
    raise DataError(
        f"A tokenizer must have an end-of-document token; `{path}` has none of "
        f"{', '.join(END_OF_DOCUMENT_NAMES)}. Name one of its tokens as `eos_token` in a "
        f"{CONFIG_NAME} next to it."
    )


def add_tokens_of_other_files(path: Path, library: tokenizers.Tokenizer) -> list[str]:
    """Add the tokens that only the files beside a ``tokenizer.json`` name, as transformers does.

    These are ``added_tokens_decoder`` of ``tokenizer_config.json``, else ``added_tokens.json``, and
    the special tokens of ``tokenizer_config.json`` and ``special_tokens_map.json``: additional
    ones, and those such as ``eos_token`` that the vocabulary has.

    Args:
        path: a ``tokenizer.json``.
        library: the tokenizer; changed.

    Returns:
        Id and properties of each token that was added or changed.

    Raises:
        DataError: a file cannot be read, or names an id other than the one that the token gets.
    """
    import tokenizers

    config = read_tokenizer_config(path.parent)
    before = library.get_added_tokens_decoder()
    listed = dict(sorted(_listed_tokens(path.parent, config, before)))
    library.add_tokens([t for i, t in listed.items() if repr(before.get(i)) != repr(t)])
    for token_id, token in listed.items():
        actual = library.token_to_id(token.content)
        if actual != token_id:
            raise DataError(
                f"The files beside `{path}` give `{token.content}` the id {token_id}; it gets "
                f"{actual}, in transformers also: added tokens follow the vocabulary without a "
                "gap. Save the tokenizer again with `save_pretrained`."
            )
    known = {token.content for token in library.get_added_tokens_decoder().values()}
    named = [name for name in _named(config) if library.token_to_id(name) is not None]
    library.add_tokens(
        [
            tokenizers.AddedToken(name, special=True, normalized=False)
            for name in dict.fromkeys([*named, *_additional(config)])
            if name not in known
        ]
    )
    after = library.get_added_tokens_decoder()
    return [f"{i} {t!r}" for i, t in sorted(after.items()) if repr(before.get(i)) != repr(t)]


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """Return ``tokenizer_config.json``, with the tokens of ``special_tokens_map.json``.

    The second file takes precedence; it is not read if the first has ``added_tokens_decoder``.

    Raises:
        DataError: a file cannot be read.
    """
    config = read_object(folder / CONFIG_NAME)
    return config if "added_tokens_decoder" in config else config | read_object(folder / _MAP_NAME)


def token_text(value: Any, name: str) -> str | None:
    """Return the text of a special token: a string, or an object with ``content``.

    Args:
        value: value of the field; None if no token is named.
        name: name of the field, for the error.

    Raises:
        DataError: it is neither.
    """
    text = value.get("content") if isinstance(value, dict) else value
    if text is None and value is None or isinstance(text, str):
        return text
    raise DataError(
        f"`{name}` must be the text of one token, or an object with it as `content`; it is "
        f"{json.dumps(value, ensure_ascii=False)}. Correct the file."
    )


def read_object(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file; empty if it does not exist.

    Raises:
        DataError: it cannot be read, or is not an object.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"`{path}` must be a JSON object: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"`{path}` must be a JSON object; it is {type(content).__name__}.")
    return content


def _named_tokens(path: Path, library: tokenizers.Tokenizer) -> Iterator[tuple[str, set[int]]]:
    """Yield the files of a tokenizer that name its end of document, and the id."""
    config = read_object(path.with_name(CONFIG_NAME))
    files = {CONFIG_NAME: config}
    if "added_tokens_decoder" not in config:
        files[_MAP_NAME] = read_object(path.with_name(_MAP_NAME))
    for file, content in files.items():
        name = token_text(content.get("eos_token"), f"eos_token` of `{path.with_name(file)}")
        if name is None:
            continue
        token_id = library.token_to_id(name)
        if token_id is None:
            raise DataError(
                f"A tokenizer must have an end-of-document token; `{path}` has no `{name}`, which "
                f"{file} names. Name one of its tokens as `eos_token` there."
            )
        yield file, {token_id}


def _named_ids(path: Path) -> Iterator[tuple[str, set[int]]]:
    """Yield the files of a model that name its end of document, and the ids."""
    for file in _MODEL_FILES:
        value = read_object(path.with_name(file)).get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(each) is int for each in ids):
            raise DataError(
                f"`eos_token_id` of `{path.with_name(file)}` must be an id or a list of ids; it is "
                f"{json.dumps(value)}. Correct the file."
            )
        if ids:
            yield file, set(ids)


def _shown(library: tokenizers.Tokenizer, token_id: int) -> str:
    token = library.id_to_token(token_id) if token_id >= 0 else None
    return f"{token_id} (`{token}`)" if token is not None else f"{token_id} (no token)"


def _listed_tokens(
    folder: Path, config: dict[str, Any], known: dict[int, tokenizers.AddedToken]
) -> Iterator[tuple[int, tokenizers.AddedToken]]:
    """Yield the tokens that a file gives an id."""
    import tokenizers

    try:
        if "added_tokens_decoder" in config:
            for key, fields in config["added_tokens_decoder"].items():
                values = {name: value for name, value in fields.items() if name != "__type"}
                yield int(key), tokenizers.AddedToken(**values)
            return
        special = {*_named(config), *_additional(config)}
        for name, token_id in read_object(folder / _ADDED_NAME).items():
            if token_id not in known:
                in_list = name in special
                yield token_id, tokenizers.AddedToken(name, special=in_list, normalized=not in_list)
    except (AttributeError, TypeError, ValueError) as error:
        raise DataError(
            f"The added tokens in `{folder}` cannot be read ({error}): `added_tokens_decoder` of "
            f"{CONFIG_NAME} must have an object for each id, {_ADDED_NAME} an id for each text."
        ) from error


def _named(config: dict[str, Any]) -> list[str]:
    """Return the texts of ``eos_token`` and the like."""
    names = [name for name, value in config.items() if name in _NAMES and value is not None]
    return [str(token_text(config[name], name)) for name in names]


def _additional(config: dict[str, Any]) -> list[str]:
    """Return the texts of additional special tokens: of a list, or of the values by name."""
    values: list[Any] = []
    for name in _ADDITIONAL:
        value = config.get(name) or []
        values += value.values() if isinstance(value, dict) else value
    return [text for value in values if (text := token_text(value, _ADDITIONAL[-1])) is not None]
