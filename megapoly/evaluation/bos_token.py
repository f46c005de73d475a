"""Beginning-of-text token that a tokenizer puts before a text."""

from __future__ import annotations

from collections.abc import Sequence

from megapoly.errors import EvaluationError


def bos_token_id(ids_of_empty_text: Sequence[int]) -> int:
    """Return the token that ``--add-bos`` puts before a text.

    Args:
        ids_of_empty_text: an empty text, encoded with special tokens.

    Raises:
        EvaluationError: the tokenizer puts nothing before a text.
    """
    if not ids_of_empty_text:
        raise EvaluationError(
            "`--add-bos` needs a tokenizer that puts a token before a text, and this model's does "
            "not; leave the option out, or where an imported checkpoint records it, give "
            "`--no-add-bos` or the import's own tokenizer"
        )
    return ids_of_empty_text[0]
