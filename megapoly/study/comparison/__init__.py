"""Train models that differ in their activation alone, and say how they differ."""
