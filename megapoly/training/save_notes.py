"""What a crash would cost: said at the start of a run that saves nothing before its end."""

from __future__ import annotations

from megapoly.config import Config

# A run of fewer steps is started again sooner than the note is read.
_FEW_STEPS = 100


def save_notes(config: Config, iteration: int, train_iters: int) -> list[str]:
    """Return a line if no checkpoint is saved before the end of a run of 100 steps or more.

    Args:
        config: of the run.
        iteration: step from which it starts.
        train_iters: its last step.
    """
    settings, left = config.checkpoint, train_iters - iteration
    if left < _FEW_STEPS:
        return []
    again = f"the run starts again from step {iteration}"
    if not settings.save:
        return [f"note: nothing is saved, as `checkpoint.save` is false: after any end {again}"]
    if 0 < settings.save_interval < left:
        return []
    why = f"`checkpoint.save_interval` is {settings.save_interval}"
    if settings.save_interval:
        why += f", and {left} steps are left"
    return [
        f"note: no checkpoint is saved before the end, as {why}: after a crash {again}; a request "
        "to stop (Ctrl-C, SIGTERM) saves"
    ]
