"""Train models that differ only in their activation, and record how they differ."""
