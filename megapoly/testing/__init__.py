"""Run functions and whole jobs on several CPU processes inside a test."""

from megapoly.testing.jobs import run_job
from megapoly.testing.ranks import run_on_ranks

__all__ = ["run_job", "run_on_ranks"]
