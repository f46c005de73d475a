"""The token before a text, for tokenizers that put one there."""

from megapoly.errors import EvaluationError


def missing_bos_token() -> EvaluationError:
    """Return the error for ``--add-bos`` with a tokenizer that has no such token."""
    return EvaluationError(
        "`--add-bos` needs a tokenizer that puts a token before a text, and this model's puts none "
        "there; leave the option out"
    )
