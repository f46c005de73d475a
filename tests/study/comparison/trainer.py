"""A run of the trainer that is over at once: its files, with a loss that the rate decides.

Its folder lacks a checkpoint the first time if STOP_FIRST names the run; it fails if FAIL does; its
loss is not finite at the rate DIVERGE, or with ACTIVATION.seed_SEED of that name.
"""

import json
import math
import os
import sys
from pathlib import Path

from megapoly.config import load_yaml

config = load_yaml(Path(sys.argv[sys.argv.index("--config") + 1]))
run_dir = Path(config.run_dir)
run_dir.mkdir(parents=True, exist_ok=True)
steps = config.training.train_iters
assert steps is not None
begun = (run_dir / "metrics.jsonl").exists()
with (run_dir / "calls").open("a") as calls:
    print(os.environ.get("OMP_NUM_THREADS"), file=calls)
if os.environ.get("FAIL") == run_dir.name:
    sys.exit("out of memory")
names = (f"{config.optimizer.lr:g}", f"{config.model.activation}.seed_{config.training.seed}")
if os.environ.get("DIVERGE") in names:
    (run_dir / "metrics.jsonl").write_text('{"iteration": 2, "lm_loss": 9.0}\n')
    sys.exit(3)
best = {"swiglu": 2e-3, "polynorm": 4e-3}[config.model.activation]
loss = 4.0 + abs(math.log2(config.optimizer.lr / best)) + 0.01 * config.training.seed
record = {
    "iteration": steps,
    "consumed_samples": steps,
    "consumed_tokens": steps,
    "lm_loss": loss,
    "val/a/loss": loss - 1,
    "val/b/loss": loss + 1,
    "val/mean/loss": loss,
}
if os.environ.get("NAN_VALIDATION") == names[0]:
    record["val/mean/loss"] = math.nan
(run_dir / "metrics.jsonl").write_text(json.dumps(record) + "\n")
if os.environ.get("STOP_FIRST") == run_dir.name and not begun:
    sys.exit(0)
checkpoint = run_dir / f"checkpoints/iter_{steps:07d}"
checkpoint.mkdir(parents=True)
(checkpoint / "run.json").write_text("{}")
