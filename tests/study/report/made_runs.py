"""Run folders with given losses, as a training run writes them."""

import json
import math
from pathlib import Path

from megapoly.config import Config, to_yaml
from megapoly.config.parsing import override
from megapoly.config.resolve import resolve
from megapoly.platform.machine import CPU

BATCH, SEQUENCE = 4, 64
STEP = BATCH * SEQUENCE  # tokens


def write_run(
    folder: Path,
    losses: list[float],
    *,
    activation: str = "polynorm",
    lr: float = 1e-3,
    seed: int = 1,
    steps: int | None = None,
    evaluations: dict[int, dict[str, float]] | None = None,
    tasks: dict[str, float] | None = None,
    task_errors: dict[str, float] | None = None,
    source: str | None = "f" * 16,
    overrides: tuple[str, ...] = (),
) -> Path:
    """Write a run whose step i has ``losses[i - 1]``, with evaluations by step and domain."""
    evaluations = evaluations or {}
    config = Config()
    config.model.hidden_size, config.model.ffn_hidden_size = 64, 264
    config.model.vocab_size = 512
    config.model.activation = activation
    config.optimizer.lr, config.optimizer.min_lr = lr, lr / 10
    config.optimizer.lr_warmup_init = lr / 100
    config.training.seed = config.data.seed = seed
    config.training.train_iters = steps or len(losses)
    config.training.global_batch_size, config.training.seq_length = BATCH, SEQUENCE
    domains = next(iter(evaluations.values()), {})
    config.data.validation = {name: f"/somewhere/{name}_text_document" for name in domains} or None
    override(config, overrides)
    folder.mkdir(parents=True)
    resolved = resolve(config, tokenizer_vocab_size=512, machine=CPU)
    (folder / "config.yaml").write_text(to_yaml(resolved))
    with (folder / "metrics.jsonl").open("w") as file:
        for step, loss in enumerate(losses, start=1):
            line = {
                "iteration": step,
                "consumed_samples": step * config.training.global_batch_size,
                "consumed_tokens": step * config.training.global_batch_size * SEQUENCE,
                "lm_loss": loss,
                "step_time_s": 0.5,
            }
            found = dict(evaluations.get(step, {}))
            if len(found) > 1:
                found["mean"] = sum(found.values()) / len(found)
            for name, value in found.items():
                line |= {f"val/{name}/loss": value, f"val/{name}/ppl": math.exp(value)}
            if step == len(losses):
                line |= {f"task/{name}": score for name, score in (tasks or {}).items()}
                line |= {f"task_stderr/{n}": error for n, error in (task_errors or {}).items()}
            file.write(json.dumps(line) + "\n")
    if source is not None:
        _write_checkpoint(folder, len(losses), source, seed)
    return folder


def _write_checkpoint(folder: Path, iteration: int, source: str, seed: int) -> None:
    """Write the part of a checkpoint that a report reads."""
    checkpoint = folder / "checkpoints" / f"iter_{iteration:07d}"
    checkpoint.mkdir(parents=True)
    data = {
        "sources": [
            {
                "name": "books",
                "path": "/somewhere/books",
                "share": 1.0,
                "tokens": 1000,
                "fingerprint": source,
            }
        ],
        "tokenizer": "ab" * 32,
        "seq_length": SEQUENCE,
        "seed": seed,
    }
    position = {
        "iteration": iteration,
        "data_fingerprint": f"{source[:12]}{seed:04d}",
        "data": data,
        "layout": {"world_size": 1},
        "megapoly_version": "0.1.0",
    }
    (checkpoint / "run.json").write_text(json.dumps(position))
