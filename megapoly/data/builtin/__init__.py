"""The built-in text: Melville, Shakespeare and Milton; see docs/reference/builtin_text.md."""

from __future__ import annotations

import hashlib
import json
import lzma
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from megapoly.data.token_files import write_token_file
from megapoly.data.tokenizer import Tokenizer

BUILTIN_TEXT = Path(__file__).parent / "books.jsonl.xz"


@dataclass(frozen=True)
class Document:
    """One chapter, poem or piece of a play.

    Args:
        source: author, work and part, such as ``melville/moby_dick/1``.
        split: what it is for; neither part has a document of the other.
        text: English text.
    """

    source: str
    split: Literal["train", "validation"]
    text: str


@cache
def builtin_documents() -> tuple[Document, ...]:
    """Return all documents of the built-in text, 7 MB."""
    with lzma.open(BUILTIN_TEXT, "rt", encoding="utf-8") as lines:
        return tuple(Document(**json.loads(line)) for line in lines)


def prepare_builtin_text(cache_dir: str | Path, tokenizer: Tokenizer) -> dict[str, Path]:
    """Tokenize the built-in text, or find it tokenized.

    The names carry a hash of text and tokenizer, so that another of either makes other files.
    Interrupted or done by several processes at once, it leaves whole files or none.

    Args:
        cache_dir: where the token files are kept.
        tokenizer: what turns text into ids.

    Returns:
        Prefix of the token files of ``train`` and of ``validation``.
    """
    text_hash = hashlib.sha256(BUILTIN_TEXT.read_bytes()).hexdigest()
    key = hashlib.sha256((text_hash + tokenizer.fingerprint).encode()).hexdigest()[:16]
    prefixes = {
        split: Path(cache_dir) / f"books-{split}-{key}" for split in ("train", "validation")
    }
    for split, prefix in prefixes.items():
        if not Path(f"{prefix}.idx").is_file():  # written last
            texts = (document.text for document in builtin_documents() if document.split == split)
            write_token_file(prefix, texts, tokenizer)
    return prefixes
