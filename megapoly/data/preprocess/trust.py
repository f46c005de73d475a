"""Is the fast tokenizer the reference? Compared before it is used, and while it is."""

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

# The reference is slow: 16,384 characters take it about 6 ms. Of a longer document a window of so
# many is compared.
COMPARED_CHARS = 16384
# Where implementations of tokenizers part: spaces, digits, scripts, combining marks, control
# characters, unassigned code points.
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
    settings: TokenizerSettings, wanted: str, sample: Sequence[str]
) -> tuple[Backend, ReferenceBackend]:
    """The library that is to turn text into ids, and the reference.

    Args:
        settings: of the tokenizer.
        wanted: ``tokenizers``; ``gigatoken``, which must be there and give the same ids on the
            sample and on texts made to be hard; or ``auto``, the second if that is so.
        sample: texts of the user's own input.

    Raises:
        UnavailableError: ``gigatoken`` is wanted and not installed.
        DataError: ``gigatoken`` is wanted and gives other ids.
    """
    reference = ReferenceBackend(settings)
    if wanted == "tokenizers":
        return reference, reference
    try:
        fast = GigatokenBackend(settings, reference)
        compare(fast, reference, [*_HARD_TEXTS, *_special_texts(settings), *sample])
    except (UnavailableError, DataError) as error:
        if wanted == "gigatoken":
            raise
        logger.warning("%s Using tokenizers, which is exact and many times slower.", error)
        return reference, reference
    return fast, reference


def compare(fast: Backend, reference: ReferenceBackend, texts: Sequence[str]) -> None:
    """Check that both give the same ids.

    Raises:
        DataError: with the first text on which they do not.
    """
    beginnings = [text[:COMPARED_CHARS] for text in texts]
    batch = fast.encode(beginnings)
    ends = np.cumsum(batch.lengths)
    for text, length, end in zip(beginnings, batch.lengths, ends, strict=True):
        compare_ids(fast.name, batch.ids[end - length : end], reference, text)


def compare_ids(name: str, ids: np.ndarray, reference: ReferenceBackend, text: str) -> None:
    """Check that ids of a text are those of the reference.

    Args:
        name: of what gave the ids.
        ids: of all of the text.
        reference: what decides.
        text: a text.

    Raises:
        DataError: they are not.
    """
    expected = reference.encode_one(text)
    if np.array_equal(ids, expected):
        return
    place = next(
        (i for i, (a, b) in enumerate(zip(ids, expected, strict=False)) if a != b),
        min(len(ids), len(expected)),
    )
    got, wanted = ids[place : place + 5].tolist(), expected[place : place + 5]
    raise DataError(
        f"{name} must give the ids of {reference.name}; from token {place} on it gives {got} in "
        f"place of {wanted} for {text[:80]!r}. Use `--tokenizer-backend tokenizers`, with "
        "`--restart` if a run was begun."
    )


def _special_texts(settings: TokenizerSettings) -> list[str]:
    """Texts that name the added tokens, alone, in a row and inside words."""
    added = json.loads(settings.json).get("added_tokens") or []
    names = [token["content"] for token in added][:64]
    return [*names, "".join(names), " ".join(names), "x".join(names)] if names else []
