"""Follow the harness while it runs: what is answered, and what it warns of."""

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
def followed(lm: LM, leaves: Sequence[Any], on_progress: OnProgress | None) -> Iterator[None]:
    """Report a model's answers to ``on_progress`` instead of to bars of its own.

    Args:
        lm: the model; answers are counted by its ``cache_hook``, which models of the harness call
            with each.
        leaves: the tasks, whose requests are counted when the first is answered.
        on_progress: called with the numbers of answered and of all requests; None changes nothing.
    """
    if on_progress is None:
        yield
        return
    hook = lm.cache_hook
    quiet = [name for name in _REQUEST_TYPES if _has_bar(getattr(lm, name))]
    lm.set_cache_hook(_Counter(leaves, on_progress))
    for name in quiet:
        setattr(lm, name, functools.partial(getattr(lm, name), disable_tqdm=True))
    try:
        yield
    finally:
        lm.set_cache_hook(hook)
        for name in quiet:
            delattr(lm, name)


def _has_bar(method: Callable[..., Any]) -> bool:
    return "disable_tqdm" in inspect.signature(method).parameters


class _Counter:
    """Counts answers in the place of the harness's ``CacheHook``."""

    def __init__(self, leaves: Sequence[Any], on_progress: OnProgress):
        self._leaves = leaves
        self._on_progress = on_progress
        self._answered = 0

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        """Is called by the model with each answer."""
        self._answered += 1
        self._on_progress(self._answered, sum(len(leaf.instances) for leaf in self._leaves))


class HarnessWarnings(logging.Handler):
    """Takes the harness's warnings, which may come with every question, and counts them."""

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
        """Forget what was counted."""
        self._by_place.clear()

    def collected(self) -> tuple[HarnessWarning, ...]:
        """Return the warnings, one for each place that warned."""
        return tuple(self._by_place.values())
