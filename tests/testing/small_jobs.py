"""The job that the tests let faults strike: steps of milliseconds, a checkpoint after each."""

from __future__ import annotations

from tiny_jobs import TINY

from megapoly.testing.jobs import RECIPES, shared_cache

NUM_STEPS = 24


def small_job(*more: str) -> list[str]:
    """Return arguments of ``megapoly train``, without ``--run_dir``."""
    fields = TINY | {
        "model.hidden_size": 32,
        "training.train_iters": NUM_STEPS,
        "logging.tensorboard": True,
        "checkpoint.save_interval": 1,
        "data.cache_dir": shared_cache().name,
    }
    words = [word for name, value in fields.items() for word in (f"--{name}", str(value))]
    return ["--config", str(RECIPES / "dense_tiny.yaml"), *words, *more]
