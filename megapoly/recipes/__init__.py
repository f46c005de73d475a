"""Configurations that are installed with the package, found by name: ``--config moe_tiny``."""
