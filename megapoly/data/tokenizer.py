"""A tokenizer: a ``tokenizer.json`` and the id that ends a document.

Every tokenizer of training, preprocessing, conversion and evaluation is read by
:func:`load_tokenizer` or :meth:`Tokenizer.from_gpt2_files`; other libraries get
:attr:`Tokenizer.json`.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megapoly.config.data_sources import tokenizer_file
from megapoly.data.special_tokens import (
    END_OF_DOCUMENT_NAMES,
    add_tokens_of_other_files,
    find_end_of_document,
)
from megapoly.errors import DataError
from megapoly.platform import launcher
from megapoly.platform.files import is_file, is_folder

if TYPE_CHECKING:
    import tokenizers

logger = logging.getLogger(__name__)

BUILTIN_TOKENIZER = Path(__file__).parent / "builtin" / "tokenizer.json"


class Tokenizer:
    """Encodes text without adding special tokens, and never cuts or pads it.

    ``truncation`` and ``padding`` of the file, which transformers saves with the tokenizer, are
    cleared. Tokens that only the files beside it name are added
    (:mod:`megapoly.data.special_tokens`).

    Attributes:
        path: the file.
        json: content of the ``tokenizer.json`` with these changes.
        fingerprint: SHA-256 of the file, and of the tokens that were added.
        num_tokens: number of tokens in the vocabulary.
        vocab_size: rows that an embedding needs: the highest id plus one.
        eod: id that ends a document.

    Has the attributes of ``GPTDatasetConfig.tokenizer`` that the engine reads: ``vocab_size``,
    ``eod`` and ``unique_identifiers`` (megatron/core/datasets/gpt_dataset.py). It deliberately has
    no ``pad``: the engine would mask the loss of every padding id in the text.

    Args:
        path: a ``tokenizer.json``.

    Raises:
        DataError: the file cannot be read, or the end-of-document token is unknown.
    """

    def __init__(self, path: Path):
        self._read(path, _read_bytes(path))

    @classmethod
    def from_gpt2_files(cls, vocab_file: Path, merge_file: Path) -> Tokenizer:
        """Load the byte-level BPE of a ``vocab.json`` and a ``merges.txt``, GPT-2's files.

        Raises:
            DataError: a file cannot be read, or the vocabulary has no ``<|endoftext|>``.
        """
        for path in (vocab_file, merge_file):
            _read_bytes(path)
        import tokenizers

        try:
            model = tokenizers.models.BPE.from_file(str(vocab_file), str(merge_file))
        except Exception as error:  # the library raises plain Exception
            raise DataError(
                f"`{vocab_file}` and `{merge_file}` are not the vocabulary and merges of a BPE: "
                f"{error}"
            ) from error
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        tokenizer.add_special_tokens([END_OF_DOCUMENT_NAMES[0]])
        made = cls.__new__(cls)
        made._read(vocab_file, tokenizer.to_str().encode())
        return made

    def _read(self, path: Path, content: bytes) -> None:
        import tokenizers  # here, not above: `megapoly preprocess verify --help` needs no extra

        self.path = path
        self.fingerprint = hashlib.sha256(content).hexdigest()
        try:
            self.json = content.decode("utf-8")
            self._tokenizer = tokenizers.Tokenizer.from_str(self.json)
        except Exception as error:  # the library raises plain Exception
            raise DataError(
                f"`{path}` is not a tokenizer.json that can be read: {error}"
            ) from error
        if ignore_truncation_and_padding(self._tokenizer, path):
            self.json = self._tokenizer.to_str()
        if added := add_tokens_of_other_files(path, self._tokenizer):
            self.json = self._tokenizer.to_str()
            self.fingerprint = hashlib.sha256(content + "\n".join(added).encode()).hexdigest()
        # A document that mentions "<|endoftext|>" must not end there.
        self._tokenizer.encode_special_tokens = True
        self.num_tokens = self._tokenizer.get_vocab_size(with_added_tokens=True)
        # Ids may have gaps, so the number of tokens is not the size that an embedding needs.
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.eod = find_end_of_document(path, self._tokenizer)

    def encode(self, text: str) -> list[int]:
        """Return the ids of one text."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_with_special_tokens(self, text: str) -> list[int]:
        """Return the ids of one text, with the post-processor's ids such as ``<s>``."""
        return self._tokenizer.encode(text, add_special_tokens=True).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of several texts; uses all cores."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, including special tokens."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def token(self, token_id: int) -> str:
        """Return the vocabulary entry of one id."""
        token = self._tokenizer.id_to_token(token_id)
        assert token is not None, token_id
        return token

    def tokens_from(self, first: int) -> dict[int, str]:
        """Return the vocabulary entries of the ids from ``first`` on, in their order."""
        entries = self._tokenizer.get_vocab(with_added_tokens=True).items()
        return dict(sorted((i, token) for token, i in entries if i >= first))

    def token_id(self, token: str) -> int | None:
        """Return the id of a vocabulary entry; None if it does not exist."""
        return self._tokenizer.token_to_id(token)

    @property
    def unique_identifiers(self) -> dict[str, str]:
        """Entries that the engine adds to the description of a sample index."""
        return {"class": type(self).__name__, "fingerprint": self.fingerprint}


def load_tokenizer(path: str | Path | None) -> Tokenizer:
    """Load a tokenizer; the files beside it are read as transformers reads them.

    They name the end-of-document token, see
    :func:`megapoly.data.special_tokens.find_end_of_document`.

    Args:
        path: a ``tokenizer.json``, or a folder that holds one or GPT-2's ``vocab.json`` and
            ``merges.txt``; None: the built-in tokenizer.

    Raises:
        DataError: the file does not exist or cannot be read, or its end-of-document token is
            unknown.
    """
    if path is None:
        return Tokenizer(BUILTIN_TOKENIZER)
    path = Path(path)
    if not is_folder(path):
        return Tokenizer(path)
    gpt2_files = path / "vocab.json", path / "merges.txt"
    if not (path / "tokenizer.json").is_file() and all(file.is_file() for file in gpt2_files):
        return Tokenizer.from_gpt2_files(*gpt2_files)
    return Tokenizer(path / "tokenizer.json")


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"`data.tokenizer` must be a tokenizer.json or a folder that holds one; `{path}` "
            f"cannot be read ({error.strerror})."
        ) from error


def ignore_truncation_and_padding(library: tokenizers.Tokenizer, path: Path) -> bool:
    """Clear what would cut or pad texts, and say once which of it there was.

    Args:
        library: the tokenizer; changed.
        path: file that it was read from.

    Returns:
        Whether there was any.
    """
    kept = {"truncation": library.truncation, "padding": library.padding}
    found = [name for name, value in kept.items() if value is not None]
    library.no_truncation()
    library.no_padding()
    if found:
        _say_once(
            f"`{path}` was saved with {' and '.join(found)}; this is ignored: no text is cut or "
            "padded"
        )
    return bool(found)


@functools.cache
def _say_once(message: str) -> None:
    if launcher.rank() == 0:
        logger.warning(message)


def tokenizer_vocab_size(tokenizer: str | None) -> int | None:
    """Return the vocabulary size of a tokenizer; None if its file does not exist.

    Args:
        tokenizer: ``data.tokenizer``: a ``tokenizer.json`` or its folder; None: the built-in one.

    Raises:
        DataError: the file exists and cannot be used.
    """
    if tokenizer is not None and not is_file(tokenizer_file(tokenizer)):
        return None
    return load_tokenizer(tokenizer).vocab_size
