"""Exact match and F1 of short answers, for harness tasks that import them from transformers.

The harness's CoQA imports `transformers.data.metrics` (lm-eval 0.4.13,
lm_eval/tasks/coqa/utils.py), which transformers 5 does not have.

Source: the evaluation script of SQuAD 1.1 (Rajpurkar et al., 2016).
"""

from __future__ import annotations

import importlib.util
import re
import string
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

_PLACE = "transformers.data.metrics"
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def compute_exact(a_gold: str, a_pred: str) -> int:
    """Return 1 if two answers are equal except for case, punctuation and articles, else 0."""
    return int(_words(a_gold) == _words(a_pred))


def compute_f1(a_gold: str, a_pred: str) -> float:
    """Return the F1 of the words of two answers.

        f1 = 2 c / (g + p)

    where c counts the common words with multiplicity, and g and p are the numbers of words. If an
    answer has no words, the result is 1 if the other has none either, else 0.
    """
    gold, predicted = _words(a_gold), _words(a_pred)
    if not gold or not predicted:
        return float(gold == predicted)
    return 2 * (Counter(gold) & Counter(predicted)).total() / (len(gold) + len(predicted))


@contextmanager
def squad_metrics_importable() -> Iterator[None]:
    """Provide this module as ``transformers.data.metrics.squad_metrics`` if that is missing."""
    if importlib.util.find_spec(_PLACE) is not None:
        yield
        return
    added = {_PLACE: ModuleType(_PLACE), f"{_PLACE}.squad_metrics": sys.modules[__name__]}
    added[_PLACE].__path__ = []
    sys.modules.update(added)
    try:
        yield
    finally:
        for name in added:
            del sys.modules[name]


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()
