"""Checks before a job is started: installation, layouts, memory, time, exactness."""
