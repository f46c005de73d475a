"""Exact match and F1 of short answers, for harness tasks that look for them in transformers.

Transformers 5 has no `transformers.data.metrics` any more, and the harness's CoQA imports it
(lm-eval 0.4.13, lm_eval/tasks/coqa/utils.py).

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
    """Return 1 if two answers have the same words, case, punctuation and articles apart, else 0."""
    return int(_words(a_gold) == _words(a_pred))


def compute_f1(a_gold: str, a_pred: str) -> float:
    """Return the F1 of the words of two answers.

        f1 = 2 c / (g + p)

    with c words in common, counted as often as both have them, of g and p words. If one has no
    words, it is 1 if neither has any, else 0.
    """
    gold, predicted = _words(a_gold), _words(a_pred)
    if not gold or not predicted:
        return float(gold == predicted)
    return 2 * (Counter(gold) & Counter(predicted)).total() / (len(gold) + len(predicted))


@contextmanager
def squad_metrics_importable() -> Iterator[None]:
    """Let ``transformers.data.metrics.squad_metrics`` be this module, where there is none."""
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
