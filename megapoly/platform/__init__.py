"""Machine, launcher, work-arounds for the engine, files, logs and progress bars."""
