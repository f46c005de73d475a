"""Tokenize texts in batches: the tokenizer as Megatron's tool uses it, and the libraries for it.

The reference is the package ``tokenizers``. ``gigatoken`` gives the same ids more than ten times
faster for most byte-pair tokenizers; it is compared with the reference before and while it is used
(:mod:`megapoly.data.preprocess.backend_check`).
"""

from __future__ import annotations

import functools
import importlib.metadata
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from json import dumps as dump_json
from json import loads as parse_json
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import psutil
import tokenizers

from megapoly.data.index_file import token_dtype
from megapoly.data.manifest import TokenizerRecord
from megapoly.data.special_tokens import read_tokenizer_config
from megapoly.data.tokenizer import Tokenizer, load_tokenizer
from megapoly.errors import DataError
from megapoly.platform import extras

_PROBE = "a"
# `tokenizers` needs about 150 bytes of memory for each byte of a batch.
_REFERENCE_BATCH_CHARS = 1 << 20
_FORMS: tuple[Literal["NFC", "NFD", "NFKC", "NFKD"], ...] = ("NFC", "NFD", "NFKC", "NFKD")
# gigatoken caches every word; without a limit a worker grows by about a gigabyte for 25 million
# distinct words. Measured with gigatoken 0.10.
MAX_CACHE_BYTES = 128 << 20


@dataclass(frozen=True)
class TokenizerSettings:
    """A tokenizer and the ids that are added; they determine the bytes of the token files.

    Args:
        type: Megatron's name for its type.
        path: file that it was read from.
        json: see :class:`megapoly.data.tokenizer.Tokenizer`.
        sha256: its fingerprint.
        num_tokens: tokens in the vocabulary.
        vocab_size: rows that an embedding needs: the highest id plus one.
        eod: id that ends a document.
        append_eod: whether every document ends with it.
        prefix: ids that the tokenizer itself adds before every text.
        suffix: ids that it adds after every text.
        split_special_tokens: whether the name of a special token in a text is treated as text;
            false: it becomes that token, as in Megatron's tool.
    """

    type: str
    path: str
    json: str
    sha256: str
    num_tokens: int
    vocab_size: int
    eod: int
    append_eod: bool
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    split_special_tokens: bool

    @property
    def dtype(self) -> np.dtype:
        """Type of an id in the token file; Megatron's choice unless the ids do not fit."""
        dtype = token_dtype(self.num_tokens)
        fits = self.vocab_size - 1 <= np.iinfo(dtype).max
        return dtype if fits else np.dtype(np.int32)

    def record(self, backend: str) -> TokenizerRecord:
        """Return the record for the manifest."""
        return TokenizerRecord(
            type=self.type,
            path=self.path,
            sha256=self.sha256,
            vocab_size=self.vocab_size,
            eod=self.eod,
            appends_eod=self.append_eod,
            prefix=list(self.prefix),
            suffix=list(self.suffix),
            backend=backend,
        )


def load_settings(
    path: str | None,
    *,
    type_: str,
    append_eod: bool,
    include_special_tokens: bool,
    split_special_tokens: bool,
    vocab_file: str | None = None,
    merge_file: str | None = None,
) -> TokenizerSettings:
    """Read a tokenizer.

    Args:
        path: a ``tokenizer.json`` or its folder (``HuggingFaceTokenizer``); None: the built-in one.
        type_: ``HuggingFaceTokenizer`` or ``GPT2BPETokenizer``.
        append_eod: end every document with the end-of-document token.
        include_special_tokens: add the ids of the tokenizer's post-processor, such as Llama's
            ``<s>``.
        split_special_tokens: see :class:`TokenizerSettings`; also true if the tokenizer's
            ``tokenizer_config.json`` says so, as in transformers.
        vocab_file: ``vocab.json`` of a ``GPT2BPETokenizer``.
        merge_file: ``merges.txt`` of a ``GPT2BPETokenizer``.

    Raises:
        DataError: it cannot be read, has no single end-of-document token, or its post-processor
            does more than add ids before and after a text.
    """
    if type_ == "GPT2BPETokenizer":
        if vocab_file is None or merge_file is None:
            raise DataError(
                "`--tokenizer-type GPT2BPETokenizer` needs --vocab-file and --merge-file."
            )
        tokenizer = Tokenizer.from_gpt2_files(Path(vocab_file), Path(merge_file))
    else:
        tokenizer = load_tokenizer(path)
    config = read_tokenizer_config(tokenizer.path.parent)
    prefix, suffix = _added_ids(tokenizer) if include_special_tokens else ((), ())
    return TokenizerSettings(
        type=type_,
        path=str(tokenizer.path),
        json=tokenizer.json,
        sha256=tokenizer.fingerprint,
        num_tokens=tokenizer.num_tokens,
        vocab_size=tokenizer.vocab_size,
        eod=tokenizer.eod,
        append_eod=append_eod,
        prefix=prefix,
        suffix=suffix,
        split_special_tokens=split_special_tokens or config.get("split_special_tokens") is True,
    )


def _added_ids(tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids that the post-processor adds before and after a text."""
    text, full = tokenizer.encode(_PROBE), tokenizer.encode_with_special_tokens(_PROBE)
    for start in range(len(full) - len(text) + 1):
        if full[start : start + len(text)] == text:
            return tuple(full[:start]), tuple(full[start + len(text) :])
    raise DataError(
        f"The tokenizer's post-processor must only add ids before and after a text; `{_PROBE}` is "
        f"{text} without it and {full} with it. Leave it out with "
        "--tokenizer-hf-no-include-special-tokens."
    )


@dataclass(frozen=True)
class TokenBatch:
    """Ids of several texts, concatenated.

    Args:
        ids: [tokens].
        lengths: [texts] int64, tokens of each text.
    """

    ids: np.ndarray
    lengths: np.ndarray


class Backend(Protocol):
    """A library that turns texts into ids, without prefix, suffix and end of document.

    ``kind`` is its name in ``--tokenizer-backend``, ``name`` the library and its version.
    """

    kind: str
    name: str

    def encode(self, texts: Sequence[str]) -> TokenBatch:
        """Return the ids of texts."""
        ...


class ReferenceBackend:
    """The package ``tokenizers``.

    Args:
        settings: the tokenizer.
    """

    kind = "tokenizers"

    def __init__(self, settings: TokenizerSettings):
        self.name = f"tokenizers {tokenizers.__version__}"
        self._settings = settings

    @cached_property
    def _tokenizer(self) -> tokenizers.Tokenizer:
        tokenizer = tokenizers.Tokenizer.from_str(self._settings.json)
        tokenizer.encode_special_tokens = self._settings.split_special_tokens
        return tokenizer

    def encode(self, texts: Sequence[str]) -> TokenBatch:
        """Return the ids of texts."""
        rows: list[np.ndarray] = []
        batch: list[str] = []
        size = 0
        for text in texts:
            batch.append(text)
            size += len(text)
            if size >= _REFERENCE_BATCH_CHARS:
                rows += self._encode_batch(batch)
                batch, size = [], 0
        rows += self._encode_batch(batch)
        lengths = np.array([len(row) for row in rows], np.int64)
        return TokenBatch(np.concatenate([np.zeros(0, np.uint32), *rows]), lengths)

    def encode_one(self, text: str) -> list[int]:
        """Return the ids of one text."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]


class GigatokenBackend:
    """The package ``gigatoken``, in the calling thread.

    Args:
        settings: the tokenizer.
        reference: backend of the same tokenizer for doubtful texts; None: created here.

    Raises:
        UnavailableError: the package is not installed.
        DataError: it does not support this kind of tokenizer.
    """

    kind = "gigatoken"

    def __init__(self, settings: TokenizerSettings, reference: ReferenceBackend | None = None):
        try:
            import gigatoken
        except ImportError as error:
            raise extras.unavailable(
                "--tokenizer-backend gigatoken", "data", ["gigatoken"]
            ) from error
        self.name = f"gigatoken {importlib.metadata.version('gigatoken')}"
        self._json = _without_special_tokens(settings)
        self._reference = reference or ReferenceBackend(settings)
        self._is_doubtful = DoubtfulTexts(settings.json)
        self._load = gigatoken.Tokenizer.from_json
        try:
            self._reload()
        except Exception as error:  # the library raises what its parsers raise
            raise DataError(f"{self.name} does not support this kind of tokenizer.") from error

    def _reload(self) -> None:
        self._tokenizer: Any = None  # frees the memory before the next one is created
        self._tokenizer = self._load(self._json)
        self._bytes_at_start = _resident_bytes()

    def encode(self, texts: Sequence[str]) -> TokenBatch:
        """Return the ids of texts."""
        import awkward

        if not texts:
            return TokenBatch(np.zeros(0, np.uint32), np.zeros(0, np.int64))
        doubtful = [i for i, text in enumerate(texts) if self._is_doubtful(text)]
        if doubtful:
            return self._encode_mixed(texts, doubtful)
        rows = self._tokenizer.encode_batch(list(texts), parallel=False)
        batch = TokenBatch(
            awkward.flatten(rows).to_numpy(), awkward.num(rows).to_numpy().astype(np.int64)
        )
        if _resident_bytes() - self._bytes_at_start > MAX_CACHE_BYTES:
            self._reload()
        return batch

    def _encode_mixed(self, texts: Sequence[str], doubtful: Sequence[int]) -> TokenBatch:
        """Return the ids of texts of which the reference encodes some."""
        is_doubtful = set(doubtful)
        rows: list[np.ndarray] = [np.zeros(0, np.uint32)] * len(texts)
        for backend, indices in (
            (self._reference, list(doubtful)),
            (self, [i for i in range(len(texts)) if i not in is_doubtful]),
        ):
            batch = backend.encode([texts[i] for i in indices])
            for i, row in zip(indices, np.split(batch.ids, np.cumsum(batch.lengths)), strict=False):
                rows[i] = row
        lengths = np.array([len(row) for row in rows], np.int64)
        return TokenBatch(np.concatenate(rows), lengths)


class DoubtfulTexts:
    """Finds texts that libraries with different Unicode versions may tokenize differently.

    gigatoken 0.10 and tokenizers 0.23 order some combining marks differently in normalization, and
    differ on recently added letters. Neither changes text that is already normalized and whose
    characters are in Python's own tables.

    Args:
        json: the ``tokenizer.json``, which says whether texts are normalized.
    """

    def __init__(self, json: str):
        content = parse_json(json)
        normalizer = dump_json(content.get("normalizer"))
        self._forms = [form for form in _FORMS if f'"{form}"' in normalizer]
        self._has_classes = bool(content.get("pre_tokenizer"))

    def __call__(self, text: str) -> bool:
        """Return whether the reference has to tokenize a text."""
        if text.isascii():
            return False
        if any(not unicodedata.is_normalized(form, text) for form in self._forms):
            return True
        if not (self._forms or self._has_classes):
            return False
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        return bool(_unassigned()[codes].any())


@functools.cache
def _unassigned() -> np.ndarray:
    """Return which code points are not in Python's Unicode tables; [0x110000] bool."""
    table = np.zeros(0x110000, bool)
    table[0x30000:0xF0000] = True  # except for what follows
    for code in (*range(0x33480), *range(0xE0000, 0xE0200)):
        table[code] = unicodedata.category(chr(code)) == "Cn"
    return table


def _resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)


def _without_special_tokens(settings: TokenizerSettings) -> str:
    """Return the ``tokenizer.json`` for gigatoken, which always matches every added token."""
    if not settings.split_special_tokens:
        return settings.json
    content = parse_json(settings.json)
    content["added_tokens"] = [
        token for token in content.get("added_tokens") or [] if not token.get("special")
    ]
    return dump_json(content)


def add_ids(batch: TokenBatch, settings: TokenizerSettings) -> TokenBatch:
    """Add prefix, suffix and end of document to every text.

    A text without ids, where prefix and suffix are also empty, stays empty and gets no end of
    document, as in Megatron's tool (tools/preprocess_data.py, ``Encoder.encode``).

    Args:
        batch: ids of the texts.
        settings: ids to add.

    Returns:
        ``ids`` in the dtype of the token file.
    """
    before = settings.prefix
    after = (*settings.suffix, *((settings.eod,) if settings.append_eod else ()))
    has_ids = batch.lengths > 0
    if settings.prefix or settings.suffix:
        has_ids = np.ones_like(has_ids)
    lengths = batch.lengths + has_ids * (len(before) + len(after))
    ends = np.cumsum(lengths)[has_ids]
    starts = ends - lengths[has_ids]
    ids = np.empty(int(lengths.sum()), settings.dtype)
    is_text = np.ones(len(ids), bool)
    for i, token in enumerate(before):
        ids[starts + i] = token
        is_text[starts + i] = False
    for i, token in enumerate(reversed(after), start=1):
        ids[ends - i] = token
        is_text[ends - i] = False
    ids[is_text] = batch.ids
    return TokenBatch(ids, lengths)
