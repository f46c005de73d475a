"""A tokenizer: a ``tokenizer.json`` and the id that ends a document."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from megapoly.config.data_sources import tokenizer_file
from megapoly.errors import DataError
from megapoly.platform.files import is_file, is_folder

BUILTIN_TOKENIZER = Path(__file__).parent / "builtin" / "tokenizer.json"
END_OF_DOCUMENT_NAMES = ("<|endoftext|>", "</s>", "<eos>")


class Tokenizer:
    """Encodes text without adding special tokens.

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
        # A document that mentions "<|endoftext|>" must not end there.
        self._tokenizer.encode_special_tokens = True
        self.num_tokens = self._tokenizer.get_vocab_size(with_added_tokens=True)
        # Ids may have gaps, so the number of tokens is not the size that an embedding needs.
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.eod = self._find_eod()

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

    def token_id(self, token: str) -> int | None:
        """Return the id of a vocabulary entry; None if it does not exist."""
        return self._tokenizer.token_to_id(token)

    @property
    def unique_identifiers(self) -> dict[str, str]:
        """Entries that the engine adds to the description of a sample index."""
        return {"class": type(self).__name__, "fingerprint": self.fingerprint}

    def _find_eod(self) -> int:
        configured = _configured_eos(self.path.with_name("tokenizer_config.json"))
        names = (configured,) if configured is not None else END_OF_DOCUMENT_NAMES
        for name in names:
            token_id = self._tokenizer.token_to_id(name)
            if token_id is not None:
                return token_id
        raise DataError(
            f"A tokenizer must have an end-of-document token; `{self.path}` has none of "
            f"{', '.join(names)}. Name one of its tokens as `eos_token` in a "
            f"tokenizer_config.json next to it."
        )


def load_tokenizer(path: str | Path | None) -> Tokenizer:
    """Load a tokenizer.

    The end-of-document token is the ``eos_token`` of a ``tokenizer_config.json`` next to the file,
    or else the first of ``END_OF_DOCUMENT_NAMES`` that the vocabulary has.

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


def _configured_eos(path: Path) -> str | None:
    """Return the ``eos_token`` of the file: a string, or the ``content`` of an object."""
    if not path.is_file():
        return None
    try:
        token = json.loads(path.read_text(encoding="utf-8")).get("eos_token")
    except (ValueError, AttributeError) as error:
        raise DataError(f"`{path}` must be a JSON object: {error}") from error
    return token.get("content") if isinstance(token, dict) else token


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
