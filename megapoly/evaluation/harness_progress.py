"""Progress and warnings of the harness while it runs."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from megapoly.evaluation.results import HarnessWarning
from megapoly.platform.progress import OnProgress

if TYPE_CHECKING:
    from lm_eval.api.model import LM

_REQUEST_TYPES = ("loglikelihood", "loglikelihood_rolling", "generate_until")


@contextmanager
def report_answers(lm: LM, leaves: Sequence[Any], on_progress: OnProgress | None) -> Iterator[None]:
    """Report a model's answers to ``on_progress`` instead of its own progress bars.

    Args:
        lm: the model; its ``cache_hook``, which models of the harness call with each answer, counts
            the answers.
        leaves: the tasks; their requests are counted when the first one is answered.
        on_progress: called with the numbers of answered and of all requests; None has no effect.
    """
    if on_progress is None:
        yield
        return
    hook = lm.cache_hook
    silenced = [name for name in _REQUEST_TYPES if _has_bar(getattr(lm, name))]
    lm.set_cache_hook(_AnswerCounter(leaves, on_progress))
    for name in silenced:
        setattr(lm, name, functools.partial(getattr(lm, name), disable_tqdm=True))
    try:
        yield
    finally:
        lm.set_cache_hook(hook)
        for name in silenced:
            delattr(lm, name)


def _has_bar(method: Callable[..., Any]) -> bool:
    return "disable_tqdm" in inspect.signature(method).parameters


class _AnswerCounter:
    """Counter of answers that replaces the harness's ``CacheHook``."""

    def __init__(self, leaves: Sequence[Any], on_progress: OnProgress):
        self._leaves = leaves
        self._on_progress = on_progress
        self._answered = 0

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        """Count an answer; called by the model."""
        self._answered += 1
        self._on_progress(self._answered, sum(len(leaf.instances) for leaf in self._leaves))


class HarnessWarnings(logging.Handler):
    """Handler that counts the harness's warnings, which may come with every question."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._by_place: dict[tuple[str, int], HarnessWarning] = {}
        self._logger = logging.getLogger("lm_eval")

    def emit(self, record: logging.LogRecord) -> None:
        """Count a warning."""
        place = (record.pathname, record.lineno)
        earlier = self._by_place.get(place, HarnessWarning(record.getMessage(), 0))
        self._by_place[place] = HarnessWarning(earlier.text, earlier.count + 1)

    def __enter__(self) -> HarnessWarnings:
        self._propagate = self._logger.propagate
        self._logger.propagate = False
        self._logger.addHandler(self)
        return self

    def __exit__(self, *exception: object) -> None:
        self._logger.removeHandler(self)
        self._logger.propagate = self._propagate

    def clear(self) -> None:
        """Reset all counts."""
        self._by_place.clear()

    def collected(self) -> tuple[HarnessWarning, ...]:
        """Return the warnings, one for each line of code that warned."""
        return tuple(self._by_place.values())
