"""Make the built-in text and its tokenizer (``megapoly/data/builtin``).

    python tools/make_builtin_text.py books.jsonl

Reads documents ``{"text", "source"}`` of Melville, Shakespeare and Milton, leaves out all but their
English text, marks every twentieth document as validation, and trains a byte-level BPE on the
training documents. It always writes the same bytes. With another version of ``tokenizers`` or
liblzma the tokenizer or the compressed file may differ; the text inside does not.
"""

from __future__ import annotations

import argparse
import json
import lzma
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from megapoly.data.tokenizer_training import train_tokenizer

BUILTIN = Path(__file__).resolve().parents[1] / "megapoly" / "data" / "builtin"
VOCAB_SIZE = 4096

# An annotated edition of 1891, and collections that are in good part Latin, an editor's notes, or
# another edition of poems that are in other documents.
LEFT_OUT = ("shksp/comus_gut/", "shksp/poemata_gut/", "shksp/poetical_works_gut/")
MILTON = ("areopagitica", "lallegro", "paradise")

# Documents are in the order of the works, so equal distances spread the validation part over the
# collection. With this offset it is 5 % of the text and has documents of each author.
VALIDATION_PERIOD = 20
VALIDATION_OFFSET = 2


def clean_source(source: str) -> str:
    """Return author, work and part: ``shakespeare/hamlet/3`` for ``shksp/hamlet_gut/3``."""
    if chapter := re.fullmatch(r"moby/chapter_(\d+)", source):
        return f"melville/moby_dick/{chapter[1]}"
    match = re.fullmatch(r"shksp/(.+)_gut/(\d+)", source)
    if match is None:
        raise ValueError(f"`source` must be moby/chapter_N or shksp/WORK_gut/N, not {source!r}.")
    work = match[1].removesuffix("_(no_introduction)")
    author = "milton" if work.startswith(MILTON) else "shakespeare"
    return f"{author}/{work}/{match[2]}"


def clean_text(text: str) -> str:
    """Remove line numbers, dots and rules of the layout, control characters and outer space."""
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f\ufeff]", "", text)
    text = re.sub(r" {4,}\d+$", "", text, flags=re.MULTILINE)
    text = re.sub(r"^\.{4,}", "", text, flags=re.MULTILINE)
    text = re.sub(r"^_{4,}$", "", text, flags=re.MULTILINE)
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def read_documents(lines: Iterable[str]) -> Iterator[dict[str, str]]:
    """Yield ``{"source", "split", "text"}`` for every document that is kept."""
    kept = (d for d in map(json.loads, lines) if not d["source"].startswith(LEFT_OUT))
    for index, document in enumerate(kept):
        held_out = index % VALIDATION_PERIOD == VALIDATION_OFFSET
        yield {
            "source": clean_source(document["source"]),
            "split": "validation" if held_out else "train",
            "text": clean_text(document["text"]),
        }


def main() -> None:
    """Write ``books.jsonl.xz`` and ``tokenizer.json``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help='JSONL with the fields "text" and "source"')
    parser.add_argument("--output", type=Path, default=BUILTIN)
    arguments = parser.parse_args()

    with arguments.source.open(encoding="utf-8") as lines:
        documents = list(read_documents(lines))
    text = "".join(json.dumps(d, ensure_ascii=False) + "\n" for d in documents)
    compressed = lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME)
    (arguments.output / "books.jsonl.xz").write_bytes(compressed)

    tokenizer = train_tokenizer((d["text"] for d in documents if d["split"] == "train"), VOCAB_SIZE)
    tokenizer.save(str(arguments.output / "tokenizer.json"))
    for split in ("train", "validation"):
        sizes = [len(d["text"].encode()) for d in documents if d["split"] == split]
        print(f"{split}: {len(sizes)} documents, {sum(sizes):,} bytes")
    print(f"books.jsonl.xz: {len(compressed):,} bytes")


if __name__ == "__main__":
    main()
