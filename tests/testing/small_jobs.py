"""The job that the tests let faults strike: steps of milliseconds, a checkpoint after each."""

from __future__ import annotations

from megapoly.testing.jobs import RECIPES, shared_cache

NUM_STEPS = 24


def small_job(*more: str) -> list[str]:
    """Return arguments of ``megapoly train``, without ``--run_dir``."""
    fields = {
        "model.num_layers": 2,
        "model.hidden_size": 32,
        "model.ffn_hidden_size": 64,
        "model.num_attention_heads": 2,
        "model.activation_backend": "reference",
        "training.device": "cpu",
        "training.train_iters": NUM_STEPS,
        "training.seq_length": 32,
        "training.micro_batch_size": 2,
        "training.global_batch_size": 4,
        "training.eval_interval": 0,
        "optimizer.lr_warmup_iters": 2,
        "checkpoint.save_interval": 1,
        "data.cache_dir": shared_cache().name,
    }
    words = [word for name, value in fields.items() for word in (f"--{name}", str(value))]
    return ["--config", str(RECIPES / "dense_tiny.yaml"), *words, *more]
