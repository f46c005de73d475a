"""The built-in text: Melville, Shakespeare and Milton; see docs/reference/builtin_text.md."""

from __future__ import annotations

import hashlib
import json
import lzma
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Literal

from megapoly.data.cache_files import built_once
from megapoly.data.token_files import pair_paths, write_token_file
from megapoly.data.tokenizer import Tokenizer

BUILTIN_TEXT = Path(__file__).parent / "books.jsonl.xz"


@dataclass(frozen=True)
class BuiltinDocument:
    """One chapter, poem or piece of a play.

    Args:
        source: author, work and number, such as ``melville/moby_dick/1``.
        split: what it is used for; no document is in both splits.
        text: English text.
    """

    source: str
    split: Literal["train", "validation"]
    text: str


@cache
def builtin_documents() -> tuple[BuiltinDocument, ...]:
    """Return all documents of the built-in text (7 MB)."""
    with lzma.open(BUILTIN_TEXT, "rt", encoding="utf-8") as lines:
        return tuple(BuiltinDocument(**json.loads(line)) for line in lines)


def prepare_builtin_text(cache_dir: str | Path, tokenizer: Tokenizer) -> dict[str, Path]:
    """Tokenize the built-in text unless its token files exist and are whole.

    File names contain a hash of text and tokenizer, so a change of either creates other files.
    When interrupted, or run by several processes at once, it leaves complete files or none.

    Args:
        cache_dir: folder for the token files.
        tokenizer: turns text into ids.

    Returns:
        Prefixes of the token files of ``train`` and ``validation``.
    """
    text_hash = hashlib.sha256(BUILTIN_TEXT.read_bytes()).hexdigest()
    key = hashlib.sha256((text_hash + tokenizer.fingerprint).encode()).hexdigest()[:16]
    prefixes = {
        split: Path(cache_dir) / f"books-{split}-{key}" for split in ("train", "validation")
    }
    for split, prefix in prefixes.items():
        build = partial(_tokenize, split, prefix, tokenizer)
        built_once(pair_paths(prefix), Path(f"{prefix}.sums.json"), build)
    return prefixes


def _tokenize(split: str, prefix: Path, tokenizer: Tokenizer) -> None:
    texts = (document.text for document in builtin_documents() if document.split == split)
    write_token_file(prefix, texts, tokenizer)
