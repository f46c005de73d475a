"""Memory, messages and time of a job on machines that are not available."""
