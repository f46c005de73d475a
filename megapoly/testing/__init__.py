"""Run functions and whole jobs on several CPU processes inside a test."""

from megapoly.preflight.local_ranks import run_on_ranks
from megapoly.testing.jobs import run_job

__all__ = ["run_job", "run_on_ranks"]
