"""Some texts of the input, from all over it."""

from __future__ import annotations

from collections.abc import Sequence

from megapoly.data.preprocess.parts import Piece, num_units, read_piece
from megapoly.data.preprocess.records import RecordRules
from megapoly.data.preprocess.sources import Source

_SAMPLED_SOURCES = 8
_SAMPLED_CHARS = 256 << 10
# Of a document, of which the comparison reads no more.
_DOCUMENT_CHARS = 16 << 10
_RANGE_BYTES = 128 << 10
_TEXTS_OF_A_PLACE = 64


def sample_texts(sources: Sequence[Source], rules: RecordRules) -> list[str]:
    """Texts from the beginning and the middle of up to eight files, 256 Ki characters in all.

    Args:
        sources: of the input.
        rules: what makes a record good; bad ones are passed over here.

    Raises:
        DataError: a file cannot be read, or lacks a column.
    """
    step = max(1, len(sources) // _SAMPLED_SOURCES)
    chosen = range(0, len(sources), step)[:_SAMPLED_SOURCES]
    pieces = [(sources[i], piece) for i in chosen for piece in _places(i, sources[i])]
    budget = _SAMPLED_CHARS // max(1, len(pieces))
    texts: list[str] = []
    for source, piece in pieces:
        left, num_texts = budget, _TEXTS_OF_A_PLACE
        for block in read_piece(source, piece, 0, rules):
            for text in (text for column in block.texts for text in column):
                texts.append(text[: min(left, _DOCUMENT_CHARS)])
                left -= len(texts[-1])
                num_texts -= 1
                if left <= 0 or num_texts <= 0:
                    break
            if left <= 0 or num_texts <= 0:
                break
    return texts


def _places(number: int, source: Source) -> list[Piece]:
    """Where to look into a file: at the beginning, and where that can be reached the middle."""
    units = num_units(source)
    if source.format not in ("jsonl", "parquet") or units < 2:
        return [Piece(number, 0, units)]
    length = min(units // 2, _RANGE_BYTES) if source.format == "jsonl" else 1
    middle = units // 2
    return [Piece(number, 0, length), Piece(number, middle, middle + length)]
