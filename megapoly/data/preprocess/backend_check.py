"""Check that the fast tokenizer gives the ids of the reference, before and during a run."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence

import numpy as np

from megapoly.data.preprocess.tokenization import (
    Backend,
    GigatokenBackend,
    ReferenceBackend,
    TokenizerSettings,
)
from megapoly.errors import DataError, UnavailableError

logger = logging.getLogger(__name__)

# The reference is slow: it takes about 6 ms for 16,384 characters. Of a longer document a window of
# this size is compared.
COMPARED_CHARS = 16384
# Texts on which implementations of tokenizers differ: spaces, digits, scripts, combining marks,
# control characters, unassigned code points.
_HARD_TEXTS = (
    "",
    " ",
    "\n\n\n  \t x\r\n\u00a0y\u2003z",
    " " * 25 + "a" + " " * 100,
    "a\u0301 \u00e1 \ufb01 \u1e9e \u0130 I\u0307",
    "1234567890 12.5e-3 \u0661\u0662\u0663 \u00bd",
    "\u4f60\u597d\u4e16\u754c \u3053\u3093\u306b\u3061\u306f \uc548\ub155",
    "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \u2603\ufe0f",
    "\x00\x01\x7f\x85\ufeff\ufffd\ufffe \ue000 \U0010ffff",
    "it's we'll I'M don\u2019t 'tis ''s",
    "\u2581\u2581a\u2581 <0x0A> </w> ## \u0120",
)


def choose_backend(
    settings: TokenizerSettings, requested: str, sample: Sequence[str]
) -> tuple[Backend, ReferenceBackend]:
    """Return the backend that turns text into ids, and the reference.

    Args:
        settings: the tokenizer.
        requested: ``tokenizers``; ``gigatoken``, which must be installed and give the same ids on
            the sample and on difficult texts; or ``auto``: ``gigatoken`` if it is and does.
        sample: texts of the user's own input.

    Raises:
        UnavailableError: ``gigatoken`` is requested and not installed.
        DataError: ``gigatoken`` is requested and gives different ids.
    """
    reference = ReferenceBackend(settings)
    if requested == "tokenizers":
        return reference, reference
    try:
        fast = GigatokenBackend(settings, reference)
        compare_backends(fast, reference, [*_HARD_TEXTS, *_special_texts(settings), *sample])
    except (UnavailableError, DataError) as error:
        if requested == "gigatoken":
            raise
        logger.warning("%s Using tokenizers, which is exact and many times slower.", error)
        return reference, reference
    return fast, reference


def compare_backends(fast: Backend, reference: ReferenceBackend, texts: Sequence[str]) -> None:
    """Check that both backends give the same ids.

    Raises:
        DataError: they do not; the message names the first text on which they differ.
    """
    beginnings = [text[:COMPARED_CHARS] for text in texts]
    batch = fast.encode(beginnings)
    ends = np.cumsum(batch.lengths)
    for text, length, end in zip(beginnings, batch.lengths, ends, strict=True):
        compare_ids(fast.name, batch.ids[end - length : end], reference, text)


def compare_ids(name: str, ids: np.ndarray, reference: ReferenceBackend, text: str) -> None:
    """Check that a text has the same ids as with the reference.

    Args:
        name: name of the backend that gave the ids.
        ids: ids of the whole text.
        reference: the reference.
        text: the text.

    Raises:
        DataError: they are not.
    """
    expected = reference.encode_one(text)
    if np.array_equal(ids, expected):
        return
    first = next(
        (i for i, (a, b) in enumerate(zip(ids, expected, strict=False)) if a != b),
        min(len(ids), len(expected)),
    )
    got, wanted = ids[first : first + 5].tolist(), expected[first : first + 5]
    raise DataError(
        f"{name} must give the ids of {reference.name}; from token {first} it gives {got} instead "
        f"of {wanted} for {text[:80]!r}. Use `--tokenizer-backend tokenizers`, and `--restart` "
        "to drop finished shards."
    )


def _special_texts(settings: TokenizerSettings) -> list[str]:
    """Return texts that contain the names of added tokens: alone, in a row and inside words."""
    added = json.loads(settings.json).get("added_tokens") or []
    names = [token["content"] for token in added][:64]
    return [*names, "".join(names), " ".join(names), "x".join(names)] if names else []
