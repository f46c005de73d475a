"""Checkpoints as files: what proves them whole, and reading them without executing anything."""
