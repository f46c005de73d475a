"""The machine and its launcher, the engine's work-arounds, what is logged."""
