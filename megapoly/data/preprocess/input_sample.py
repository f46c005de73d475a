"""Sample texts from all over the input."""

from __future__ import annotations

from collections.abc import Sequence

from megapoly.data.preprocess.input_parts import FileRange, num_units, read_file_range
from megapoly.data.preprocess.source_files import SourceFile
from megapoly.data.preprocess.text_extraction import RecordRules

_SAMPLED_SOURCES = 8
_SAMPLED_CHARS = 256 << 10
# Of one document; the comparison of tokenizers reads no more.
_DOCUMENT_CHARS = 16 << 10
_RANGE_BYTES = 128 << 10
_TEXTS_PER_RANGE = 64


def sample_texts(sources: Sequence[SourceFile], rules: RecordRules) -> list[str]:
    """Return texts from the beginning and middle of up to eight files, 256 Ki characters in total.

    Args:
        sources: input files.
        rules: rules for a valid record; invalid ones are skipped here.

    Raises:
        DataError: a file cannot be read, or a column is missing.
    """
    ranges = [
        (sources[i], file_range)
        for i in spread(len(sources), _SAMPLED_SOURCES)
        for file_range in _sampled_ranges(i, sources[i])
    ]
    budget = _SAMPLED_CHARS // max(1, len(ranges))
    texts: list[str] = []
    for source, file_range in ranges:
        left, num_texts = budget, _TEXTS_PER_RANGE
        for batch in read_file_range(source, file_range, 0, rules):
            for text in (text for column in batch.texts for text in column):
                texts.append(text[: min(left, _DOCUMENT_CHARS)])
                left -= len(texts[-1])
                num_texts -= 1
                if left <= 0 or num_texts <= 0:
                    break
            if left <= 0 or num_texts <= 0:
                break
    return texts


def spread(count: int, limit: int) -> range:
    """Return at most ``limit`` of the indices below ``count``, evenly spread."""
    return range(0, count, max(1, count // limit))[:limit]


def _sampled_ranges(number: int, source: SourceFile) -> list[FileRange]:
    """Return ranges at the beginning of a file and, if it can be read there, in the middle."""
    units = num_units(source)
    if source.format not in ("jsonl", "parquet") or units < 2:
        return [FileRange(number, 0, units)]
    length = min(units // 2, _RANGE_BYTES) if source.format == "jsonl" else 1
    middle = units // 2
    return [FileRange(number, 0, length), FileRange(number, middle, middle + length)]
