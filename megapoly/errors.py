"""Exceptions that users, configurations or files can cause."""

from __future__ import annotations

from collections.abc import Sequence


class MegapolyError(Exception):
    """Base class of megapoly's errors; the command line prints only their text.

    ``is_shown``: whether this process has printed it, or another one of its host.
    """

    is_shown = False


class ConfigError(MegapolyError):
    """The configuration breaks one or more rules.

    Args:
        problems: one message per broken rule, with the rule, the values and the remedy.
    """

    def __init__(self, problems: Sequence[str]):
        self.problems = list(problems)
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        lines = "\n".join(f"  {i}. {problem}" for i, problem in enumerate(problems, start=1))
        super().__init__(f"The configuration has {count}:\n{lines}")


class DataError(MegapolyError):
    """A token file, tokenizer or text cannot be used."""


class CheckpointError(MegapolyError):
    """A checkpoint is missing, incomplete or does not fit the model."""


class LockError(MegapolyError):
    """Another job trains in the same folder."""


class DivergenceError(MegapolyError):
    """A loss or the gradient of a step is not finite, or a spike that ends the run."""


class LaunchError(MegapolyError):
    """What a launcher sets for a process, or is given itself, cannot be used."""


class PeerError(MegapolyError):
    """Another process of the job failed or did not respond in time.

    ``exit_status``: of the process that failed, where it is known, for this one to end alike.
    """

    exit_status: int | None = None


class LostPeerError(PeerError):
    """Another process of the job ended in the middle of the run, or stopped answering.

    The run is as valid as before: started again, it resumes. With an ``exit_status`` the other
    process has failed and said why.
    """


class ShapeError(MegapolyError, ValueError):
    """A tensor has a shape that the operator does not support."""


class UnavailableError(MegapolyError):
    """A requested feature is not available on this machine or installation."""


class EvaluationError(MegapolyError):
    """A benchmark cannot be run: its name is unknown, or its questions are missing or unusable."""
